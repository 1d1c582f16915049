"""Words around a value: units, which may be missing but not differ, and words that change it or say nothing.

After a number any noun may stand for what is counted ("12 apples"), so the words that change a number are
named; before it only words that say nothing may stand ("the answer is 5").
"""

import re
from functools import lru_cache

_NAMES = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre", "cm centimeter centimeters centimetre",
        "m meter meters metre metres", "km kilometer kilometers kilometre", "in inch inches",
        "ft foot feet", "yd yard yards", "mi mile miles", "s sec second seconds", "min mins minute minutes",
        "h hr hrs hour hours", "day days", "week weeks", "month months", "year years yr", "g gm gram grams",
        "kg kilogram kilograms", "lb lbs pound pounds", "oz ounce ounces", "mg milligram milligrams",
        "ml milliliter milliliters millilitre", "l liter liters litre litres", "gallon gallons", "cent cents",
        "dollar dollars usd", "euro euros", "rad radian radians", "n newton newtons", "j joule joules",
        "w watt watts", "v volt volts", "pa pascal pascals", "hz hertz", "mol mole moles", "k kelvin",
        "ev", "degreec", "degreef", "unit units", "am", "pm",
    )
    for alias in names.split()
}  # fmt: skip
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "sqft": "ft^2", "cc": "cm^3"}
_CHANGING = frozenset(
    "or and to over out point half halves third thirds fourth fourths fifth fifths tenth tenths hundredth "  # noqa: SIM905
    "hundredths thousandth thousandths times plus minus negative e i pi x y z n k a b c mod sqrt infinity "
    "oo not is isn are was if but than choose less more fewer greater most least fold twice double triple "
    "no never none either cubed squared doubled tripled halved wrong incorrect false zero one two three "
    "four five six seven eight nine ten eleven twelve twenty hundred thousand million billion trillion "
    "dozen percent nor except without almost nearly approximately about around maybe perhaps possibly sin "
    "cos tan log ln exp factorial mille gross score dozens hundreds thousands millions billions".split()
)
_CHANGED = re.compile(r"\w{3,}(?<!spe)(?<!see)(?<!w)(?:ed|fold)$")  # squared, doubled, multiplied; not speed
_WORD = r"[A-Za-z]+\.?"
_POWER = r"(?:\s?\^\s?\{?\s?-?\d\s?\}?)?"
_UNIT = re.compile(
    rf"(?P<head>.*?[\d)\]}}|A-Za-z!%])(?P<apart>\s*)(?P<unit>(?<![A-Za-z\\]){_WORD}{_POWER}"
    rf"(?:\s?(?:/|\\cdot|\s)\s?{_WORD}{_POWER}){{0,5}})\s*",
    re.DOTALL,
)
_VALUE = re.compile(r"\d|\\pi|\\sqrt|\\frac")
_SILENT = re.compile(
    r"(?:(?:the|final|answer|value|result|solution|total|number|is|are|be|equals?|to|of|thus|so|hence|we|get|"
    r"therefore|have|it|there|only|exactly|just|simply|yes|approximately|about|option|choice)\b[\s:,]*)+",
    re.IGNORECASE,
)
_STATED = re.compile(r"(?:[A-Za-z][\w'-]*,?\s+){1,12}?(?:is|are|equals|be)\b[\s:]*", re.IGNORECASE)
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[\d\\(a-z])", re.IGNORECASE)


def strip_words(text: str) -> str:
    """An answer less the words before it that say nothing; `negative 5` is `-5`."""
    if match := _STATED.match(text):
        said = re.findall(r"[a-z]+", match[0].lower())[:-1]
        if not _CHANGING.difference(("a", "e", "i", "x", "y", "n", "to", "one", "two")).intersection(said):
            text = text[match.end() :]
    if match := _SILENT.match(text):
        text = text[match.end() :] or text
    return _NEGATIVE.sub("-", text, count=1) if _NEGATIVE.match(text) else text


@lru_cache(maxsize=8192)
def split_unit(text: str) -> tuple[str, str]:
    r"""A normalised expression less the unit behind it, `12\sqrt{13} feet`, and the unit in one notation.

    Words that change the number are no unit, and neither are variables: `3t`, `2 xy`."""
    match = _UNIT.fullmatch(text) if text[-1:].isalnum() or text[-1:] in ".}" else None
    if match is None or not _VALUE.search(match["head"]):
        return text, ""
    head, unit = match["head"].rstrip(), match["unit"]
    words = re.findall(r"[a-z]+", unit.lower())
    if _CHANGING.intersection(words) or any(map(_CHANGED.search, words)):
        return text, ""
    if not match["apart"] and (len(words[0]) < 2 or not (words[0] in _NAMES or len(words[0]) > 4)):
        return text, ""
    if head[-1:].isalpha() and not head.endswith("\\pi"):  # a variable or a word: `2x cm` is rare
        return text, ""
    if any(len(word) < 3 and word not in _NAMES and word not in ("sq", "cu", "of", "in") for word in words):
        return text, ""
    return head, _one_notation(unit)


def _one_notation(unit: str) -> str:
    """`square centimeters` as `cm^2`, `meters per second` as `m/s`."""
    unit = re.sub(r"[.{}\s]+", " ", unit.lower()).strip()
    unit = re.sub(r"\s?\bper\b\s?|\s?/\s?", "/", unit)
    unit = re.sub(r"\b(sq|square|cu|cubic)\s(\w+)", lambda m: f"{m[2]}^{3 if m[1][0] == 'c' else 2}", unit)
    unit = re.sub(
        r"[a-z]+", lambda m: _COMPOUND.get(m[0]) or _NAMES.get(m[0]) or m[0].removesuffix("s"), unit
    )
    return unit.replace(" ^", "^").replace("^ ", "^")


def unit_conflict(gold: str, answer: str) -> bool:
    """Whether both have a unit and the units differ.

    `5 dollars` and `5 dollars per day` name the same thing more or less closely; `cm^2` and `cm^3`, `km/h`
    and `km`, or `cm` and a word that is not known do not."""
    if not gold or not answer or gold == answer or "unit" in (gold[:4], answer[:4]):
        return False
    sides = [re.findall(r"[^\s/]+", unit) for unit in (gold, answer)]
    known = [[part for part in side if part.split("^")[0] in _NAMES.values()] for side in sides]
    money = {"dollar", "cent", "euro"}
    if all(known) and not money.intersection(known[0]):
        return known[0] != known[1] or gold.count("/") != answer.count("/")
    return not set(sides[0]) & set(sides[1])
