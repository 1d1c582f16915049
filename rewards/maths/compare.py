r"""Compare two answers by their structure, down to single expressions (`single.py`).

brackets    (2,\infty) is not [2,\infty): an end belongs to an interval or it does not
order       a tuple is ordered, a list or a set is not; (1,2) may answer the list "1, 2", {1,2} may not
            answer (1,2); a column may answer a tuple
count       a list equals one of as many members, so neither several answers for one nor one for several
\pm         stands for two values
choices     (C), C, C. and "C) 15" are the choice C; where the value 15 is expected, "(C) 15" is 15
units       may be missing, but not differ; the same holds for the base of a numeral, 1011_2
words       before a value only those that say nothing
regions     inequalities, intervals, unions and set builders are compared as sets of numbers
relations   see `relations.py`
"""

import re
from itertools import accumulate, pairwise

from rewards.maths.notation import compact
from rewards.maths.relations import EQUALS, FLIPPED, NAME, is_quantity, same_relation, true_members
from rewards.maths.single import Verdict, single
from rewards.maths.values.expression import parse
from rewards.maths.values.numbers import plain_number
from rewards.maths.values.regions import RELATION, SIGNS, region
from rewards.maths.values.units import split_unit, strip_words, unit_conflict

_LIST = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*(?:和|或者?)\s*|\s*;\s*|,\s*(?:and|or)\s+")
_MEMBERSHIP = re.compile(r"^\s*(?:[A-Za-z]|\\[a-zA-Z]+)\s*\\in(?![A-Za-z])\s*")
_PARAMETER = re.compile(
    r",?\s*(?:\(|where\b|for\b|with\b)?\s*(?:all|any|every|some)?\s*(?:integers?)?\s*[a-z]\s*"
    r"(?:\\in\s*\\mathbb\s*\{?\s*[ZN]\s*\}?|(?:is|are|be) (?:an? )?(?:any )?integers?)\s*\)?$"
)
_VARIABLE = re.compile(r"\s*(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?\s*")
_FUNCTION = re.compile(r"\s*([A-Za-z]\w*)\s*\(\s*([a-z])\s*\)\s*")
_CHOSEN = re.compile(
    r"(?:(?:option|choice|answer(?: choice)?)\s*:?\s*)?(?:\(\s*([A-Z])\s*\)(?![\^_(*+/!-])|"
    r"([A-Z])\s*(?:[).:](?=\s|$)|$))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_MORE_CHOICES = re.compile(r"^(?:and|or|,|/|&)|\(?\b[A-Z]\s*\)|\b(?:not|wrong|incorrect|false)\b")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_NEW_ROW = re.compile(r"\\\\(?:\s*\[-?[\d.]+\s?(?:pt|em|ex|mm|cm)\])?")
_BASE = re.compile(r"\(?(-?[0-9A-Za-z.]*\d[0-9A-Za-z]*)\)?\s*_\s*\{?\s*(\d{1,2})\s*\}?")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_OPEN, _CLOSE = "([{", ")]}"
_DEPTH_LIMIT = 8
DEGREE = "\\degree"


def compare(gold: str, answer: str, depth: int = 0) -> Verdict:
    """Value (1, 0, or `None` where the gold does not parse) and why, of two normalised answers."""
    gold, answer = (_PARAMETER.sub("", _MEMBERSHIP.sub("", text)) for text in (gold, answer))
    if compact(gold) == compact(answer):
        return 1.0, "equal as written"
    if depth > _DEPTH_LIMIT:
        return 0.0, "nested too deep"
    if (chosen := _choice(gold, answer, depth)) is not None:
        return chosen
    gold, answer = strip_words(gold), strip_words(answer)
    if SIGNS.search(f"{gold} {answer}"):
        expected, got = region(gold), region(answer)
        if expected and got:
            return float(expected.same(got)), "as sets of numbers"
        if (expected and not RELATION.search(answer)) or (got and parse(gold) is not None):
            return 0.0, "a set of numbers against something else"
        shapes = (
            _as_interval(gold),
            _as_interval(answer),
        )  # a < x < a + 1 is (a, a + 1), not the list "a, a + 1"
        gold, answer = shapes if all(shape[:1] in ("(", "[") for shape in shapes) else (gold, answer)
    verdict = _by_members(gold, answer, depth, thousands=True)
    # The commas of `100,200` may separate thousands or members, that of `1,5` may be a decimal point.
    short = verdict[0] == 0 and max(len(gold), len(answer)) < 200
    if short and (_THOUSANDS.search(gold) or _THOUSANDS.search(answer)):
        other = _by_members(gold, answer, depth, thousands=False)
        verdict, short = (other, False) if other[0] == 1 else (verdict, True)
    number = plain_number(gold)
    if short and number and number.digits and _DECIMAL_COMMA.fullmatch(answer):
        return compare(gold, answer.replace(",", "."), depth + 1)
    return verdict


def _by_members(gold: str, answer: str, depth: int, *, thousands: bool) -> Verdict:
    (kind, expected), (other, got) = members(gold, thousands), members(answer, thousands)
    if "()" in (kind, other) and (tuples := (_as_tuple(gold), _as_tuple(answer))) != (gold, answer):
        return compare(*tuples, depth + 1)
    if len(expected) == len(got) == 1:
        if "{}" in (kind, other):
            return compare(expected[0], got[0], depth + 1)
        return _one(gold, answer, depth)
    # One value in several notations, "15 39/40, or 639/40", is one value.
    notations = got if len(expected) == 1 and not other and len(got) <= 3 else []
    if notations and all([compare(gold, member, depth + 1)[0] == 1 for member in notations]):
        return 1.0, "each of them equal"
    if len(got) == 1 and EQUALS.search(answer) and not EQUALS.search(gold):
        return compare(gold, EQUALS.split(answer)[-1].strip(), depth + 1)  # M = (a, b) = (1, 2)
    if len(expected) != len(got):
        return 0.0, f"{len(got)} values where {len(expected)} are expected"
    if kind != other and (not {kind, other} <= {"", "{}", "()"} or {kind, other} == {"()", "{}"}):
        return 0.0, f"brackets {other or 'none'} where {kind or 'none'} are expected"
    ordered = "()" in (kind, other) or kind not in ("", "{}")
    if len({member.partition("=")[0] for member in expected if "=" in member}) == len(expected):
        ordered = ordered or not EQUALS.search(answer)  # x = 1, y = 2 against 2, 1
    return _all_equal(expected, got, depth, ordered=ordered)


def members(text: str, thousands: bool = True) -> tuple[str, list[str]]:
    """Its outer brackets (`()`, `[)`, `{}` for a set, or none) and the parts between its top-level commas.

    With `thousands`, a comma before three digits is part of a number. `(a, b) = (1, 2)` is `(a = 1, b = 2)`.
    """
    text = _LIST.sub(", ", text.strip())
    left, _, right = (side.strip() for side in text.partition("="))
    if left[:1] == right[:1] == "(" and "=" not in right:
        pairs = [_split(side[1:-1], False) for side in (left, right)]
        if len(pairs[0]) == len(pairs[1]) > 1:
            text = "(" + ", ".join(map("=".join, zip(*pairs, strict=True))) + ")"
    text, kind = text.replace("\\{", "{<").replace("\\}", ">}"), ""
    depths = _depths(text)
    if text[:1] in ("(", "[", "{") and depths[-1] == 0 and 0 not in depths[:-1]:  # not `(1,2) \cup (3,4)`
        if text[:2] == "{<" or (text[0] != "{" and "," in text and not _PLUS_MINUS.search(text)):
            kind = text[0] + text[-1]
            text = text[1:-1].removeprefix("<").removesuffix(">")
        elif text[0] == "{":
            text = text[1:-1]
        thousands = thousands and ", " in text  # (1,234) is a pair
    parts = [sign for part in _split(text, thousands) for sign in _signs(part)]
    return kind, [part.replace("{<", "\\{").replace(">}", "\\}") for part in parts] or [text]


def _depths(text: str) -> list[int]:
    """Brackets open behind each character."""
    return list(accumulate((character in _OPEN) - (character in _CLOSE) for character in text)) or [1]


def _split(text: str, thousands: bool) -> list[str]:
    if "\\begin" in text:
        return [text.strip()]
    kept = {match.start() for match in _THOUSANDS.finditer(text)} if thousands else ()
    depths = _depths(text)
    cuts = [i for i, sign in enumerate(text) if sign == "," and depths[i] == 0 and i not in kept]
    return [text[before + 1 : cut].strip() for before, cut in pairwise([-1, *cuts, len(text)])]


def _signs(part: str) -> list[str]:
    r"""`3 \pm 2` is two values, each as it would be written alone; all its signs change together."""
    if not _PLUS_MINUS.search(part):
        return [part]
    upper = _PLUS_MINUS.sub(lambda sign: "+" if sign[1] == "pm" else "-", part)
    lower = _PLUS_MINUS.sub(lambda sign: "-" if sign[1] == "pm" else "+", part)
    return [re.sub(r"(^|[(=,])\s*\+\s*", r"\1", text).strip() for text in (upper, lower)]


def _all_equal(gold: list[str], answer: list[str], depth: int, *, ordered: bool) -> Verdict:
    """Member by member; in any order, each takes the first that fits."""
    left, failed = list(answer), None
    for expected in gold:
        for got in left[:1] if ordered else left:
            verdict = compare(expected, got, depth + 1)
            failed = verdict if verdict[0] is None else failed
            if verdict[0] == 1:
                left.remove(got)
                break
        else:
            return failed or (0.0, "a member differs")
    return 1.0, "all members equal"


def _choice(gold: str, answer: str, depth: int) -> Verdict | None:
    """The verdict where one of them is a choice letter, with or without the text that it stands for."""
    expected, got = _CHOSEN.fullmatch(gold), _CHOSEN.fullmatch(answer)
    if any(match and _MORE_CHOICES.search(match[3]) for match in (expected, got)):
        return None
    letters = [(match[1] or match[2]).upper() if match else "" for match in (expected, got)]
    if expected and not expected[3] and gold.isupper():
        return (float(letters[0] == letters[1]), "by its letter") if got else None
    if expected and expected[3]:
        if not got:
            return compare(expected[3].strip(), answer, depth + 1)
        return float(letters[0] == letters[1]), "by its letter"
    return compare(gold, got[3].strip(), depth + 1) if got and got[3] else None


def _one(gold: str, answer: str, depth: int) -> Verdict:
    """The verdict on two answers of one member each."""
    if plain_number(gold) and plain_number(answer):
        return single(gold, answer)
    if (verdict := _relations(gold, answer, depth)) is not None:
        return verdict
    (gold_bare, gold_unit), (answer_bare, answer_unit) = split_unit(gold), split_unit(answer)
    if unit_conflict(gold_unit, answer_unit) or _of_an_angle(gold, answer):
        return 0.0, "another unit"
    if gold_unit or answer_unit:
        return compare(gold_bare, answer_bare, depth + 1)
    if (verdict := _bases(gold, answer)) is not None:
        return verdict
    if _MATRIX.fullmatch(gold) or _MATRIX.fullmatch(answer):
        return _matrices(gold, answer, depth)
    if ":" in gold + answer:
        return _ratios(gold, answer, depth)
    return single(gold, answer)


def _relations(gold: str, answer: str, depth: int) -> Verdict | None:
    """The verdict where one of them is an equation, or an inequality that is no set of numbers."""
    expected, got = EQUALS.split(gold), EQUALS.split(answer)
    if len(expected) > 1 and (len(got) == 1 or (len(got) > 2 and NAME.fullmatch(expected[0]))):
        if len(expected) == 2 and not is_quantity(expected[0]):
            return 0.0, "an equation is expected"
        return compare(expected[-1].strip(), answer, depth + 1)
    if len(expected) == 1 and (len(got) > 1 or ("mod" in answer and "mod" not in gold)):
        verdict: Verdict = (0.0, "a false equation")
        for member in true_members(answer):
            if (verdict := compare(gold, member, depth + 1))[0] != 0:
                break
        return verdict
    if len(expected) == len(got) == 2:
        function, other = _FUNCTION.fullmatch(expected[0]), _FUNCTION.fullmatch(got[0])
        if function and other and function[1] == other[1] and function[2] not in got[1]:  # g(t) = t, g(x) = x
            got[1] = re.sub(rf"(?<![\\A-Za-z]){other[2]}(?![A-Za-z])", function[2], got[1])
            got[0] = expected[0]
        if compact(expected[0]) == compact(got[0]):
            return compare(expected[1].strip(), got[1].strip(), depth + 1)
    return same_relation(gold, answer)


def _as_interval(text: str) -> str:
    sides, signs = RELATION.split(text), RELATION.findall(text)
    if signs and signs[0] in (">", "\\ge"):
        sides, signs = sides[::-1], [FLIPPED.get(sign, sign) for sign in signs[::-1]]
    if len(sides) != 3 or not set(signs) <= {"<", "\\le"} or not _VARIABLE.fullmatch(sides[1]):
        return text
    return ("(" if signs[0] == "<" else "[") + f"{sides[0]}, {sides[2]}" + (")" if signs[1] == "<" else "]")


def _matrices(gold: str, answer: str, depth: int) -> Verdict:
    """Matrices entry by entry; round or square brackets do not matter, bars (a determinant) do."""
    expected, got = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(answer)
    if not expected or not got or (expected[1].lower() == "vmatrix") != (got[1].lower() == "vmatrix"):
        return 0.0, "a matrix against something else"
    rows = [[row.split("&") for row in _rows(match[2])] for match in (expected, got)]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return 0.0, "another shape"
    entries = [[entry.strip() for row in matrix for entry in row] for matrix in rows]
    return _all_equal(entries[0], entries[1], depth, ordered=True)


def _as_tuple(text: str) -> str:
    """A column as a tuple."""
    column = _MATRIX.fullmatch(text)
    return "(" + ", ".join(_rows(column[2])) + ")" if column and "&" not in column[2] else text


def _rows(body: str) -> list[str]:
    return [row.strip() for row in _NEW_ROW.split(body) if row.strip()]


def _ratios(gold: str, answer: str, depth: int) -> Verdict:
    """`2:3` as the quotient 2/3; times of day, and ratios of more members, member by member."""
    expected, got = gold.split(":"), answer.split(":")
    if len(expected) == len(got) and (verdict := _all_equal(expected, got, depth, ordered=True))[0] != 0:
        return verdict
    if max(len(expected), len(got)) > 2 or not all(parts[-1].strip(" 0") for parts in (expected, got)):
        return 0.0, "another ratio"
    quotients = ["/".join(f"({part})" for part in parts) for parts in (expected, got)]
    return single(quotients[0], quotients[1])


def _bases(gold: str, answer: str) -> Verdict | None:
    """Numerals with a base: `1011_2`. The base may be left out, but not be another."""
    expected, got = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if not expected and not got:
        return None
    if expected and got and expected[2] != got[2]:
        return 0.0, "another base"
    digits = [match[1] if match else compact(text) for match, text in ((expected, gold), (got, answer))]
    return float(digits[0].lstrip("0").casefold() == digits[1].lstrip("0").casefold()), "by their digits"


def _of_an_angle(*sides: str) -> bool:
    """Whether one side ends in a degree sign and the other in another unit, or radians of the same number."""
    for angle, (bare, unit) in zip(sides, map(split_unit, reversed(sides)), strict=True):
        if unit and angle.rstrip().endswith(DEGREE):
            same = compact(angle.rstrip().removesuffix(DEGREE)) == compact(bare)
            return same if unit == "rad" else unit_conflict("degree", unit)
    return False
