"""Plain numbers with their units, exactly: the fast path for most answers.

Integers, decimals, fractions, mixed numbers, thousands separators, powers of ten, percent, money, simple
units, number words. All arithmetic is in fractions; nothing is rounded but where `equal_numbers` says so.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?\w\}?|\([a-z]\))?\s*=\s*([^=]+)")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*[$€£¥]?\s*(?P<sign2>-?)(?:
        (?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<top>-?{_DIGITS})\s*\}}\s*\{{\s*(?P<bottom>{_DIGITS})\s*\}}
      | (?:(?P<whole2>\d+)\s+)?(?P<top2>{_DIGITS})\s*/\s*(?P<bottom2>{_DIGITS})
      | (?P<decimal>{_DECIMAL})
        (?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?\s*(?P<power>[+-]?\d{{1,4}})\s*\}}?|[eE](?P<power2>[+-]?\d{{1,3}}))?
    )\s*(?P<percent>\\?%)?""",
    re.VERBOSE,
)
_UNIT = re.compile(r"\s?((?:[A-Za-z]++\.?(?:\s?\^?\s?\{?[23]\}?)?[/\s]*+){1,6})$")
# After a number these are not units: they change it, or join it to another.
_NOT_UNITS = frozenset(
    "or and to over out point half third quarter hundred dozen times plus minus e i pi x y z n k a b c mod "  # noqa: SIM905
    "sqrt infinity oo not is choose".split()
)
_MULTIPLES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "  # noqa: SIM905
    "seventeen eighteen nineteen twenty".split()
)  # each at its value
_UNIT_NAMES = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimeters", "cm centimeter centimeters centimetres", "m meter meters metre metres",
        "km kilometer kilometers", "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
        "s sec second seconds", "min minute minutes", "h hr hrs hour hours", "day days", "week weeks",
        "month months", "year years", "g gram grams", "kg kilogram kilograms", "lb lbs pound pounds",
        "oz ounce ounces", "ml milliliter milliliters", "l liter liters", "gallon gallons", "cent cents",
        "dollar dollars", "euro euros", "degree degrees", "rad radian radians", "mph", "kph",
    )
    for alias in names.split()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number as it was written."""

    value: Fraction
    digits: int | None  # decimal places, where it is written with a point and no percent sign
    percent: bool
    unit: str


@lru_cache(maxsize=8192)
def plain_number(text: str) -> Number | None:
    """Normalised `text` as a plain number with a unit, or `None`; `x = 5` counts as 5."""
    assigned = _ASSIGNED.fullmatch(text)
    text = (assigned[1] if assigned else text).replace("{,}", ",").strip()
    if text.casefold() in _WORDS:
        return Number(Fraction(_WORDS.index(text.casefold())), None, False, "")
    if len(text) > 200:
        return None
    unit, factor = "", 1
    match = _NUMBER.fullmatch(text)
    if match is None and (tail := _UNIT.search(text)) and tail.start():
        unit = tail[1].strip().lower()
        words = re.findall(r"[a-z]+", unit)
        if words and words[0] in _MULTIPLES:
            factor, words = _MULTIPLES[words[0]], words[1:]
            unit = " ".join(words)
        if _NOT_UNITS.intersection(words):
            return None
        # "3t" is a product; of single letters only "3 m" and its like are units, apart from the number.
        if len(unit) == 1 and (unit not in _UNIT_NAMES or not tail[0][0].isspace()):
            return None
        match = _NUMBER.fullmatch(text[: tail.start()])
    if match is None:
        return None
    try:
        value = _value(match) * factor
    except (ZeroDivisionError, ValueError):  # 1/0; an integer beyond Python's digit limit
        return None
    written = match["decimal"] or ""
    plain = "." in written and factor == 1 and not (match["power"] or match["power2"])
    percent = bool(match["percent"]) or unit in ("percent", "percents", "percentage", "pct")
    negative = (match["sign"] == "-") != (match["sign2"] == "-")
    return Number(
        value=-value if negative else value,
        digits=len(written.partition(".")[2]) if plain else None,
        percent=percent,
        unit="" if percent else unit,
    )


def _value(match: re.Match[str]) -> Fraction:
    if match["decimal"]:
        power = int(match["power"] or match["power2"] or 0)
        return Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** power
    top, bottom = match["top"] or match["top2"], match["bottom"] or match["bottom2"]
    fraction = Fraction(int(top.replace(",", "")), int(bottom.replace(",", "")))
    return int(match["whole"] or match["whole2"] or 0) + fraction


def unit_conflict(gold: str, answer: str) -> bool:
    """Whether both units are known and differ. A unit may be missing, but not differ."""
    names = {_UNIT_NAMES.get(unit.split("^")[0].strip()) for unit in (gold, answer)} - {None}
    return len(names) == 2


def equal_numbers(gold: Number, answer: Number) -> bool:
    """Whether two plain numbers are equal.

    `50%` equals 50 and 0.5 (both readings of the sign occur; a number without one has one reading), so 100
    is not 1. A decimal of six digits or more equals what rounds to it.
    """
    if unit_conflict(gold.unit, answer.unit):
        return False
    if gold.percent != answer.percent:
        signed, bare = (gold, answer) if gold.percent else (answer, gold)
        return bare.value in (signed.value, signed.value / 100)
    if gold.value == answer.value:
        return True
    return any(_rounds_to(exact.value, written) for exact, written in ((gold, answer), (answer, gold)))


def _rounds_to(exact: Fraction, written: Number) -> bool:
    """Whether a decimal with at least six significant digits is `exact`, rounded to its last place."""
    if written.digits is None or abs(written.value) * 10**written.digits < 100_000:
        return False
    if exact.denominator in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100, 1000):  # nothing to round: it differs
        return False
    return bool(2 * abs(exact - written.value) * 10**written.digits <= 1)
