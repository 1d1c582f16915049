"""Plain numbers as they are written: their units, their decimal places, number words. Values are exact."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.maths.values.evaluate import exact
from rewards.maths.values.expression import parse
from rewards.maths.values.units import split_unit

_MULTIPLE = re.compile(
    r"(-?[\d.,]*[\d.])\s*(dozen|hundred|thousand|million|billion|trillion)\b(.*)", re.IGNORECASE
)
_MULTIPLES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_DECIMAL = re.compile(r"[+-]?\s*[\d,]*\.(\d+)\s*%?")
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "  # noqa: SIM905
    "sixteen seventeen eighteen nineteen".split()
)  # each at its value
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
WORDS = {word: i for i, word in enumerate(_UNITS)} | {
    ten + part: 10 * i + j
    for i, ten in enumerate(_TENS, 2)
    for j in range(10)
    for part in ([""] if j == 0 else [f"-{_UNITS[j]}", f" {_UNITS[j]}"])
}


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number."""

    value: Fraction
    digits: int | None  # decimal places, where it is written with a point
    percent: bool
    unit: str


@lru_cache(maxsize=8192)
def plain_number(text: str) -> Number | None:
    """Normalised `text` as a number with a unit, or `None`."""
    if text.casefold() in WORDS:
        return Number(Fraction(WORDS[text.casefold()]), None, False, "")
    multiple = _MULTIPLE.fullmatch(text)
    text = f"{multiple[1]} {multiple[3]}".strip() if multiple else text
    head, unit = split_unit(text)
    tree = parse(head.removesuffix("%").removesuffix("percent"))
    number = None if tree is None else exact(tree)
    if number is None:
        return None
    decimal = None if multiple else _DECIMAL.fullmatch(head)
    factor = _MULTIPLES[multiple[2].lower()] if multiple else 1
    digits = len(decimal[1]) if decimal else None
    return Number(number * factor, digits, head.endswith(("%", "percent")), unit)


def equal_numbers(gold: Number, answer: Number) -> bool:
    """Whether two numbers are equal; of a decimal and a fraction one may be the other, rounded.

    `50%` equals 50 and 0.5 (both readings of the sign occur; a number without one has one reading), so 100
    is not 1."""
    values = {answer.value}
    if gold.percent != answer.percent:
        values.add(answer.value * 100 if gold.percent else answer.value / 100)
    if gold.value in values:
        return True
    if gold.digits is not None and answer.digits is None:
        return any(rounds_to(value, gold, 100) for value in values)
    return rounds_to(gold.value, answer, 100_000)


def rounds_to(exact: Any, written: Number, least: int) -> bool:
    """Whether a decimal is `exact`, rounded to its last place, and has as many digits as `least`.

    A reference of three digits is taken for a rounded one; an answer takes six, for 0.33 is not a third."""
    if written.digits is None or abs(written.value) * (last := Fraction(10) ** written.digits) < least:
        return False
    if not isinstance(exact, Fraction):
        context = exact.context
        gap = abs(exact - context.mpf(written.value.numerator) / written.value.denominator)
        return bool(2 * gap * last.numerator <= last.denominator)
    if written.digits >= 0 and 1000 % exact.denominator == 0:  # nothing to round: it differs
        return False
    return bool(2 * abs(exact - written.value) * last <= 1)
