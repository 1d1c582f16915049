"""Mathematical equivalence by math-verify; imported by `rewards.worker` only (sympy takes half a second).

Lists, tuples and intervals are taken apart here, because math-verify compares them loosely: brackets must
agree and there must be as many members. What is left, single expressions, goes to math-verify.
"""

from __future__ import annotations

import re
from itertools import permutations

from math_verify import (
    ExprExtractionConfig,
    LatexExtractionConfig,
    parse,
    verify,
)

_CONFIG = [LatexExtractionConfig(), ExprExtractionConfig()]
_AND = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*(?:和|或)\s*|\s*;\s*")
_MEMBERSHIP = re.compile(r"^\s*[A-Za-z]\s*\\in\s*(?!\\mathbb)")
_ASSIGNMENT = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?\s*=\s*(?=[^=]+$)")
_RELATION = re.compile(r"[<>]|\\[lg]e(?:q|qslant)?\b")  # 1 < x < 2 may be answered as (1, 2)
_OPEN, _CLOSE = "([{", ")]}"
_LIST_LIMIT = 6  # members compared in any order; beyond that in sorted order only


def equivalent(gold: str, answer: str) -> tuple[float | None, str]:
    """Compare two normalised answers: value (1, 0, or `None` where the gold does not parse) and why."""
    gold, answer = _MEMBERSHIP.sub("", gold), _MEMBERSHIP.sub("", answer)
    gold_kind, gold_members = members(gold)
    answer_kind, answer_members = members(answer)
    if len(gold_members) == 1 and (len(answer_members) == 1 or _RELATION.search(gold)):
        return _single(gold, answer)
    if len(gold_members) != len(answer_members):
        return 0.0, f"{len(answer_members)} values where {len(gold_members)} are wanted"
    loose = {"", "{}"}  # "1, 2" and "{1, 2}" say the same
    if gold_kind != answer_kind and not {gold_kind, answer_kind} <= loose | {"()"}:
        return 0.0, f"brackets {answer_kind or 'none'} where {gold_kind or 'none'} are wanted"
    ordered = "()" in (gold_kind, answer_kind) or gold_kind not in loose
    if gold_kind != answer_kind and "{}" in (gold_kind, answer_kind) and ordered:
        return 0.0, "a set is not a tuple"
    return _all_equal(gold_members, answer_members, ordered)


def members(text: str) -> tuple[str, list[str]]:
    """Its outer brackets (`()`, `[)`, `{}` for a set, or none) and the parts between its top-level commas."""
    text = _AND.sub(", ", text.strip()).replace("\\{", "{<").replace("\\}", ">}")
    kind = ""
    if text and text[0] in _OPEN and text[-1] in _CLOSE and _wraps(text) and "," in text:
        if text[0] != "{" or text.startswith("{<"):
            kind = text[0] + text[-1]
        text = text[1:-1].removeprefix("<").removesuffix(">") if kind else text
    parts = [part for part in _split(text) if part]
    expanded = [sign for part in parts for sign in _signs(part)]
    restored = [part.replace("{<", "\\{").replace(">}", "\\}") for part in expanded]
    return kind, restored or [text]


def _wraps(text: str) -> bool:
    """Whether the first bracket closes only at the end: not `(1,2) \\cup (3,4)`."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return i == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and depth == 0 and not _thousands(text, i):
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _thousands(text: str, comma: int) -> bool:
    after = text[comma + 1 : comma + 5]
    return text[:comma][-1:].isdigit() and after[:3].isdigit() and len(after) >= 3 and not after[3:].isdigit()


def _signs(part: str) -> list[str]:
    """`3 \\pm 2` is two values."""
    if part.count("\\pm") != 1 or (part.strip().startswith("\\pm") and "=" in part):
        return [part]
    return [part.replace("\\pm", sign) for sign in "+-"]


def _all_equal(gold: list[str], answer: list[str], ordered: bool) -> tuple[float | None, str]:
    orders = [answer] if ordered or len(answer) > _LIST_LIMIT else permutations(answer)
    if not ordered and len(answer) > _LIST_LIMIT:
        gold, orders = sorted(gold), [sorted(answer)]
    verdicts: dict[tuple[str, str], tuple[float | None, str]] = {}
    for order in orders:
        for pair in zip(gold, order, strict=True):
            if pair not in verdicts:
                verdicts[pair] = equivalent(*pair)  # strictly shorter than the list it stands in
            if verdicts[pair][0] is None:
                return verdicts[pair]
            if not verdicts[pair][0]:
                break
        else:
            return 1.0, "all members equal"
    return 0.0, "a member differs"


def _single(gold: str, answer: str) -> tuple[float | None, str]:
    if not _ASSIGNMENT.match(gold):
        answer = _ASSIGNMENT.sub("", answer)
    wanted = parse(f"${gold}$", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    if not wanted:
        return None, "the gold answer does not parse"
    found = parse(f"${answer}$", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        return 0.0, "the answer does not parse"
    same = verify(wanted, found, timeout_seconds=None)
    return float(same), "equal by math-verify" if same else "different by math-verify"
