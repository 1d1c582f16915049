"""Plain numbers with their units, exactly: the fast path for most answers.

Integers, decimals, fractions, mixed numbers, thousands separators, powers of ten, percent, money, simple
units, number words. All arithmetic is in fractions; nothing is rounded but where `rounds_to` says so.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.maths.units import split_unit, unit_conflict

_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?\w\}?|\([a-z]\))?\s*=\s*([^=]+)")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*[$€£¥]?\s*(?P<sign2>-?)(?:
        (?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<top>-?{_DIGITS})\s*\}}\s*\{{\s*(?P<bottom>{_DIGITS})\s*\}}
      | (?:(?P<whole2>\d+)\s+)?(?P<top2>{_DIGITS})\s*/\s*(?P<bottom2>{_DIGITS})
      | (?P<decimal>{_DECIMAL})
        (?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?\s*(?P<power>[+-]?\d{{1,4}})\s*\}}?|[eE](?P<power2>[+-]?\d{{1,3}}))?
    )\s*(?P<percent>%|percent)?""",
    re.VERBOSE,
)
_MULTIPLE = re.compile(r"(.*[\d.])\s*(dozen|hundred|thousand|million|billion|trillion)\b(.*)", re.IGNORECASE)
_MULTIPLES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "  # noqa: SIM905
    "seventeen eighteen nineteen".split()
)  # each at its value
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
WORDS = {word: i for i, word in enumerate(_UNITS)} | {
    ten + part: 10 * i + j
    for i, ten in enumerate(_TENS, 2)
    for j in range(10)
    for part in ([""] if j == 0 else [f"-{_UNITS[j]}", f" {_UNITS[j]}"])
}
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number as it was written."""

    value: Fraction
    digits: int | None  # decimal places, where it is written with a point
    percent: bool
    unit: str


@lru_cache(maxsize=8192)
def plain_number(text: str) -> Number | None:
    """Normalised `text` as a plain number with a unit, or `None`; `x = 5` counts as 5."""
    assigned = _ASSIGNED.fullmatch(text)
    text = (assigned[1] if assigned else text).replace("{,}", ",").strip()
    if len(text) > _LONGEST:
        return None
    multiple = _MULTIPLE.fullmatch(text)
    factor = _MULTIPLES[multiple[2].lower()] if multiple else 1
    text = f"{multiple[1]} {multiple[3]}".strip() if multiple else text
    match, unit = _NUMBER.fullmatch(text), ""
    if match is None:
        if text.casefold() in WORDS:
            return Number(Fraction(WORDS[text.casefold()]), None, False, "")
        head, unit = split_unit(text)
        match = _NUMBER.fullmatch(head) if unit else None
    if match is None:
        return None
    try:
        value = _value(match) * factor
    except (ZeroDivisionError, ValueError):  # 1/0; an integer beyond Python's digit limit
        return None
    written = match["decimal"] or ""
    plain = "." in written and factor == 1 and not (match["power"] or match["power2"])
    negative = (match["sign"] == "-") != (match["sign2"] == "-")
    return Number(
        value=-value if negative else value,
        digits=len(written.partition(".")[2]) if plain else None,
        percent=bool(match["percent"]),
        unit=unit,
    )


def _value(match: re.Match[str]) -> Fraction:
    if match["decimal"]:
        power = int(match["power"] or match["power2"] or 0)
        return Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** power
    top, bottom = match["top"] or match["top2"], match["bottom"] or match["bottom2"]
    fraction = Fraction(int(top.replace(",", "")), int(bottom.replace(",", "")))
    return int(match["whole"] or match["whole2"] or 0) + fraction


def equal_numbers(gold: Number, answer: Number) -> bool:
    """Whether two plain numbers are equal.

    `50%` equals 50 and 0.5 (both readings of the sign occur; a number without one has one reading), so 100
    is not 1. Of a decimal and a fraction one may be the other, rounded.
    """
    if unit_conflict(gold.unit, answer.unit):
        return False
    values = {answer.value}
    if gold.percent != answer.percent:
        values.add(answer.value * 100 if gold.percent else answer.value / 100)
    return any(gold.value == value or _rounded(gold, answer, value) for value in values)


def _rounded(gold: Number, answer: Number, value: Fraction) -> bool:
    if gold.digits is not None and answer.digits is None:
        return rounds_to(value, gold, least=100)
    return answer.value == value and rounds_to(gold.value, answer, least=100_000)


def rounds_to(exact: Any, written: Number, least: int) -> bool:
    """Whether a decimal is `exact`, rounded to its last place, and has as many digits as `least`.

    A reference of three digits is taken for a rounded one; an answer takes six, for 0.33 is not a third.
    """
    if written.digits is None or abs(written.value) * (last := Fraction(10) ** written.digits) < least:
        return False
    if isinstance(exact, Fraction) and written.digits >= 0 and 1000 % exact.denominator == 0:  # it differs
        return False
    if not isinstance(exact, Fraction):
        context = exact.context
        gap = abs(exact - context.mpf(written.value.numerator) / written.value.denominator)
        return bool(2 * gap * last.numerator <= last.denominator)
    return bool(2 * abs(exact - written.value) * last <= 1)
