"""Whether two single expressions are the same: numbers, words, formulas."""

import re

from rewards.maths.values.evaluate import TooExpensive, equal, value
from rewards.maths.values.expression import Tree, has, names, parse
from rewards.maths.values.numbers import Number, equal_numbers, plain_number, rounds_to
from rewards.maths.values.units import unit_conflict

Verdict = tuple[float | None, str]
UNREAD = ("the gold answer does not parse", "no expression that is understood completely")
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|inf)\b)[^\W\d_]{3,}")
_INTEGERS = frozenset("klmn")  # names of a parameter that is any integer
_SILENT = re.compile(r"[\s.,;:!()\"*]+|(?<=\w)['-](?=\w)")


def single(gold: str, answer: str) -> Verdict:
    """Value (1, 0, or `None` where the gold does not parse or cannot be evaluated) and why."""
    a, b = plain_number(gold), plain_number(answer)
    if a and b:
        return float(not unit_conflict(a.unit, b.unit) and equal_numbers(a, b)), "as numbers"
    if is_words(gold):
        return float(_SILENT.sub("", gold).casefold() == _SILENT.sub("", answer).casefold()), "as words"
    expected, got = parse(gold), parse(answer)
    if expected is None and any(map(str.isalnum, gold)):
        return None, UNREAD[0]
    if expected is None or got is None:
        return 0.0, UNREAD[1]
    try:
        return float(_equal_or_rounded(expected, got, a, b)), "as expressions"
    except TooExpensive as error:
        failed = not same_value(expected, expected)
        return None if failed else 0.0, f"the {'gold ' * failed}answer is too expensive to evaluate: {error}"


def same_value(a: Tree, b: Tree) -> bool:
    """Whether two expressions have a value here and it is the same."""
    try:
        return equal(a, b)
    except TooExpensive:
        return False


def is_words(text: str) -> bool:
    """Whether an answer is words (`Evelyn`, `even`, `C`) rather than an expression."""
    if len(text) == 1:
        return text.isupper() and text.isascii()
    return text.casefold() == "no" or (bool(WORD.search(text)) and (text.isalpha() or parse(text) is None))


def _equal_or_rounded(gold: Tree, answer: Tree, a: Number | None, b: Number | None) -> bool:
    if equal(gold, answer):
        return True
    written, other, least = (a, answer, 100) if a else (b, gold, 100_000)
    if written is not None and written.digits and not names(other):
        found = value(other)
        return found is not None and not found.imag and rounds_to(found.real, written, least)
    free = names(gold), names(answer)
    if [len(name) for name in free] == [1, 1] and free[0] | free[1] <= _INTEGERS and free[0] != free[1]:
        (new,), (old,) = free  # 2 pi k and 2 pi n: any integer, by whatever name
        return has(gold, "pi") and equal(gold, _renamed(answer, old, new))
    return False


def _renamed(tree: Tree, old: str, new: str) -> Tree:
    if tree == ("variable", old):
        return ("variable", new)
    return tuple(_renamed(part, old, new) if isinstance(part, tuple) else part for part in tree)
