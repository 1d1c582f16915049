r"""Compare two answers by their structure: choices, lists, tuples, intervals, sets, assignments, units.

This is the policy layer around the engine, for what graders are known to get wrong: math-verify alone gives
another verdict than the label on 63 of the 287 pairs in `tests/rewards/answers.py`. It takes answers apart
until single expressions are left and asks `leaf` for those. In the trainer's process `leaf` is the fast exact
path and raises `Undecided` where algebra is needed; in a worker it goes on to math-verify.

The rules, each with its reason:
  brackets    (2,\infty) is not [2,\infty): an end belongs to an interval or it does not
  order       a tuple is ordered, a list or a set is not; (1,2) may answer the list "1, 2", {1,2} may not
              answer (1,2)
  count       a list equals one of as many members, so neither several answers for one nor one for several
  \pm         stands for two values
  x = 3       answers 3, and 3 answers x = 3; where an equation is expected, it or its right-hand side counts
  chains      of a chain `a = b \approx c` the last member counts, and those that agree with it to 1 %
  choices     (C), C, C. and "C) 15" are the choice C; where the value 15 is expected, "(C) 15" is 15
  units       may be missing, but not differ; the same holds for the base of a numeral, 1011_2
  words       compare as words: case and punctuation do not matter
  inequality  1 < x < 2 may be answered as (1, 2), and the other way round (by the engine)
"""

import re
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, pairwise, permutations

from rewards.maths.arithmetic import differ_or_equal, readable, value_of
from rewards.maths.notation import compact, split_unit
from rewards.maths.numbers import equal_numbers, plain_number, unit_conflict
from rewards.maths.spans import is_expression, numbers

Leaf = Callable[[str, str], tuple[float | None, str]]
Verdict = tuple[float | None, str]


class Undecided(Exception):
    """Takes algebra to decide."""


def _verdict(same: bool, equal: str, different: str) -> Verdict:
    return float(same), equal if same else different


_AND = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*(?:和|或者?)\s*|\s*;\s*|,\s*(?:and|or)\s+")
_MEMBERSHIP = re.compile(r"^\s*(?:[A-Za-z]|\\[a-zA-Z]+)\s*\\in\s*(?!\\mathbb)")
_LEFT_SIDE = re.compile(
    r"^\s*(?:[A-Za-z]|\\[a-zA-Z]+)(?:_\w|_\s*\{[^{}]*\}|'|\([a-zA-Z0-9, ]*\))*\s*=\s*(?=[^=]+$)"
)
_EQUALS = re.compile(r"(?<![<>!:])=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])")
_RELATION = re.compile(r"[<>]|\\[lg]e(?:q|qslant)?(?![A-Za-z])|\\[lg]t(?![A-Za-z])|\\n?eq?(?![A-Za-z])")
_RELATION_SIGN = re.compile(r"=|[<>]|\\[lg]e")
_CHOSEN = re.compile(
    r"(?:(?:option|choice|answer(?: choice)?)\s*:?\s*)?(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[).:](?=\s|$))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_MODULUS = re.compile(r"\(?\s*\\?(?:p|b)?mod\s*(?:\{\s*\w+\s*\}|\w+)\s*\)?\s*$")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_BASE = re.compile(r"(-?[0-9A-Za-z]*\d[0-9A-Za-z]*)\s*_\s*\{?\s*(\d{1,2})\s*\}?")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_OPEN, _CLOSE = "([{", ")]}"
_LIST_LIMIT = 6  # members matched in any order by trying all; beyond that each takes the first that fits
_DEPTH_LIMIT = 8


def compare(gold: str, answer: str, leaf: Leaf, depth: int = 0) -> Verdict:
    """Value (1, 0, or `None` where the gold does not parse) and why, of two normalised answers.

    Raises what `leaf` raises.
    """
    gold, answer = _MEMBERSHIP.sub("", gold), _MEMBERSHIP.sub("", answer)
    if gold == answer or compact(gold) == compact(answer):
        return 1.0, "equal as written"
    if "mod" in answer and "mod" not in gold:  # 3 \\pmod 7, where 3 is expected
        answer = _MODULUS.sub("", answer).strip()
    if depth > _DEPTH_LIMIT:
        return 0.0, "nested too deep"
    if (chosen := _choice(gold, answer, leaf, depth)) is not None:
        return chosen
    verdict = _by_members(gold, answer, leaf, depth, thousands=True)
    # The commas of `100,200` may separate thousands or members.
    if verdict[0] == 0 and any(_THOUSANDS.search(text) and len(text) < 200 for text in (gold, answer)):
        other = _by_members(gold, answer, leaf, depth, thousands=False)
        return other if other[0] == 1 else verdict
    return verdict


def _by_members(gold: str, answer: str, leaf: Leaf, depth: int, *, thousands: bool) -> Verdict:
    gold_kind, gold_members = members(gold, thousands)
    answer_kind, answer_members = members(answer, thousands)
    several = len(gold_members) > 1
    if not several and (len(answer_members) == 1 or _RELATION.search(gold)):
        return _single(gold, answer, leaf, depth)
    if several and len(answer_members) == 1 and _RELATION.search(answer) and gold_kind not in ("", "{}"):
        return leaf(gold, answer)  # an interval answered by an inequality
    notations = answer_members if not several and not answer_kind and len(answer_members) <= 3 else []
    # One value in several notations, "15 39/40, or 639/40", is one value.
    if notations and all([compare(gold, member, leaf, depth + 1)[0] == 1 for member in notations]):
        return 1.0, "each of them equal"
    if several and len(answer_members) == 1 and _EQUALS.search(answer) and not _EQUALS.search(gold):
        return compare(gold, _EQUALS.split(answer)[-1].strip(), leaf, depth + 1)  # M = (a, b) = (1, 2)
    if len(gold_members) != len(answer_members):
        return 0.0, f"{len(answer_members)} values where {len(gold_members)} are expected"
    loose = {"", "{}"}  # "1, 2" and "{1, 2}" mean the same
    if gold_kind != answer_kind and not {gold_kind, answer_kind} <= loose | {"()"}:
        return 0.0, f"brackets {answer_kind or 'none'} where {gold_kind or 'none'} are expected"
    ordered = "()" in (gold_kind, answer_kind) or gold_kind not in loose
    if gold_kind != answer_kind and "{}" in (gold_kind, answer_kind) and ordered:
        return 0.0, "a set is not a tuple"
    return _all_equal(gold_members, answer_members, ordered, leaf, depth)


def members(text: str, thousands: bool = True) -> tuple[str, list[str]]:
    """Its outer brackets (`()`, `[)`, `{}` for a set, or none) and the parts between its top-level commas.

    With `thousands`, a comma before three digits is part of a number.
    """
    text = _AND.sub(", ", text.strip()).replace("\\{", "{<").replace("\\}", ">}")
    kind = ""
    if text and text[0] in _OPEN and text[-1] in _CLOSE and _wraps(text) and "," in text:
        if text[0] != "{" or text.startswith("{<"):
            kind = text[0] + text[-1]
        text = text[1:-1].removeprefix("<").removesuffix(">") if kind else text
        thousands = thousands and ", " in text  # (1,234) is a pair
    parts = [part for part in _split(text, thousands) if part]
    expanded = [sign for part in parts for sign in _signs(part)]
    restored = [part.replace("{<", "\\{").replace(">}", "\\}") for part in expanded]
    return kind, restored or [text]


def _wraps(text: str) -> bool:
    r"""Whether the first bracket closes only at the end: not `(1,2) \cup (3,4)`."""
    depths = _depths(text)
    return depths[-1] == 0 and 0 not in depths[:-1]


def _depths(text: str) -> list[int]:
    """Brackets open behind each character."""
    return list(accumulate((character in _OPEN) - (character in _CLOSE) for character in text))


def _split(text: str, thousands: bool) -> list[str]:
    if "\\begin" in text:
        return [text.strip()]
    commas = [i for i, depth in enumerate(_depths(text)) if depth == 0 and text[i] == ","]
    cuts = [i for i in commas if not (thousands and _thousands(text, i))]
    return [text[before + 1 : cut].strip() for before, cut in pairwise([-1, *cuts, len(text)])]


def _thousands(text: str, comma: int) -> bool:
    after = text[comma + 1 : comma + 5]
    return text[:comma][-1:].isdigit() and after[:3].isdigit() and len(after) >= 3 and not after[3:].isdigit()


def _signs(part: str) -> list[str]:
    r"""`3 \pm 2` is two values, each as it would be written alone."""
    if part.count("\\pm") != 1 or (part.strip().startswith("\\pm") and "=" in part):
        return [part]
    return [part.replace("\\pm", sign).strip().removeprefix("+").strip() for sign in "+-"]


def _all_equal(gold: list[str], answer: list[str], ordered: bool, leaf: Leaf, depth: int) -> Verdict:
    verdicts: dict[tuple[str, str], Verdict] = {}

    def same(pair: tuple[str, str]) -> bool:
        if pair not in verdicts:
            verdicts[pair] = compare(*pair, leaf, depth + 1)
        return verdicts[pair][0] == 1

    if not ordered and len(answer) > _LIST_LIMIT:
        left = list(answer)
        for expected in gold:
            match = next((got for got in left if same((expected, got))), None)
            if match is None:
                break
            left.remove(match)
        found = not left
    else:
        orders = [tuple(answer)] if ordered else permutations(answer)
        found = any(all(same(pair) for pair in zip(gold, order, strict=True)) for order in orders)
    if found:
        return 1.0, "all members equal"
    return next((verdict for verdict in verdicts.values() if verdict[0] is None), (0.0, "a member differs"))


def _choice(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict | None:
    """The verdict where one of them is a choice letter, with or without the text that it stands for."""
    expected, got = _CHOSEN.fullmatch(gold), _CHOSEN.fullmatch(answer)
    said = (
        (got[1] or got[2]).upper() if got else answer.upper() if len(answer) == 1 and answer.isalpha() else ""
    )
    if len(gold) == 1 and "A" <= gold <= "Z":
        return _verdict(said == gold, "same choice", "another choice") if said else None
    if expected and expected[3]:
        if not said:
            return compare(expected[3].strip(), answer, leaf, depth + 1)
        same = said == (expected[1] or expected[2]).upper()
        return (
            _verdict(same, "same choice", "another choice") if got else (float(same), "choice by its letter")
        )
    if got and got[3] and not expected:
        return compare(gold, got[3].strip(), leaf, depth + 1)
    return None


def _single(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict:
    if _EQUALS.search(answer) and not _EQUALS.search(gold):
        return _chain(gold, [part for part in _EQUALS.split(answer) if part.strip()], leaf, depth)
    if _EQUALS.search(gold) and not _EQUALS.search(answer) and _LEFT_SIDE.match(gold):
        gold = _LEFT_SIDE.sub("", gold)
    elif gold.count("=") == 1 and _EQUALS.search(gold) and not _RELATION_SIGN.search(answer):
        return 0.0, "an equation is expected"
    if plain_number(gold) and plain_number(answer):
        return leaf(gold, answer)
    gold_bare, gold_unit = split_unit(gold)
    answer_bare, answer_unit = split_unit(answer)
    if gold_unit or answer_unit:
        if unit_conflict(gold_unit, answer_unit):
            return 0.0, "another unit"
        return compare(gold_bare, answer_bare, leaf, depth + 1)
    if (verdict := _bases(gold, answer) or _matrices(gold, answer, leaf, depth)) is not None:
        return verdict
    if ("\\cup" in gold and readable(answer)) or ("\\cup" in answer and readable(gold)):
        return 0.0, "a union of intervals is not a number"
    return leaf(gold, answer)


def _matrices(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict | None:
    """Matrices entry by entry; round or square brackets do not matter, bars (a determinant) do."""
    expected, got = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(answer)
    if expected and got and (expected[1] in ("vmatrix", "Vmatrix")) == (got[1] in ("vmatrix", "Vmatrix")):
        rows = [[row.split("&") for row in re.split(r"\\\\", m[2]) if row.strip()] for m in (expected, got)]
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return 0.0, "another shape"
        entries = [[entry.strip() for row in matrix for entry in row] for matrix in rows]
        return _all_equal(entries[0], entries[1], True, leaf, depth)
    if (expected and readable(answer)) or (got and readable(gold)):
        return 0.0, "a matrix is not a number"
    return None


def _chain(gold: str, parts: list[str], leaf: Leaf, depth: int) -> Verdict:
    """The last member of `a = b \\approx c`; or one before it that is the same number to 1 %."""
    if not parts:
        return 0.0, "empty answer"
    verdict = compare(gold, parts[-1].strip(), leaf, depth + 1)
    with suppress(OverflowError):  # a number too large for floating point
        last = _value(parts[-1])
        for part in parts[:-1][::-1][:4]:
            if verdict[0] == 1 or last is None:
                break
            value = _value(part)
            if value is not None and abs(value - last) <= 0.01 * abs(last):
                earlier = compare(gold, part.strip(), leaf, depth + 1)
                verdict = earlier if earlier[0] == 1 else verdict
    return verdict


def _value(text: str) -> complex | None:
    number = plain_number(text.strip())
    return complex(number.value) if number else value_of(text)


def _bases(gold: str, answer: str) -> Verdict | None:
    """Numerals with a base: `1011_2`. The base may be left out, but not be another."""
    expected, got = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if not expected and not got:
        return None
    if expected and got and expected[2] != got[2]:
        return 0.0, "another base"
    digits = (expected[1] if expected else compact(gold), got[1] if got else compact(answer))
    if not all(part.removeprefix("-").isalnum() for part in digits):
        return (0.0, "a numeral is not an expression") if readable(gold if got else answer) else None
    same = digits[0].lstrip("0").casefold() == digits[1].lstrip("0").casefold()
    return _verdict(same, "same digits", "other digits")


def quick_leaf(gold: str, answer: str) -> Verdict:
    """The verdict on two single expressions; raises `Undecided` where it takes algebra."""
    a, b = plain_number(gold), plain_number(answer)
    if a and b:
        return _verdict(equal_numbers(a, b), "equal numbers", "different numbers")
    if is_words(gold):
        return _verdict(_letters(gold) == _letters(answer), "equal words", "different words")
    if not any(character.isalnum() for character in answer):
        return 0.0, "the answer is empty"
    if not is_expression(answer):
        return _prose(gold, answer)
    decided = differ_or_equal(gold, answer)
    if decided is None:
        raise Undecided
    return _verdict(decided, "equal expressions", "different values")


def _prose(gold: str, answer: str) -> Verdict:
    """An answer with words in it: its one number, if it has just one."""
    if not is_expression(gold):
        return _verdict(_letters(gold) == _letters(answer), "equal text", "different text")
    found = numbers(answer)
    if len(found) != 1:
        if re.search(r"\\[a-zA-Z]|[=^]", answer):
            raise Undecided
        return 0.0, "words where an expression is expected"
    a, b = plain_number(gold), plain_number(found[0].content)
    if a and b and len(re.findall(r"\d", answer)) == len(re.findall(r"\d", found[0].content)):
        return _verdict(equal_numbers(a, b), "equal numbers", "different numbers")
    raise Undecided


def is_words(text: str) -> bool:
    """Whether an answer is words (`Evelyn`, `even`, `C`) rather than an expression."""
    if len(text) == 1:
        return text.isupper() and text.isascii()
    letters = text.replace(" ", "").replace("-", "").replace("'", "")
    if letters.lower() in ("sin", "cos", "tan", "infty", "infinity"):
        return False
    if len(letters) > 2 and letters.isalpha():
        return True
    return "\\" not in text and re.search(r"[^\W\d_]{3}", text) is not None and not is_expression(text)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", re.sub(r"\\[A-Za-z]+", "", text)).casefold()
