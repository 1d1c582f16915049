r"""Compare two answers by their structure: choices, lists, tuples, intervals, sets, assignments, units.

Answers are taken apart until single expressions are left, and `leaf` is asked for those: `quick_leaf`, or in a
worker the engine, for sums and integrals.

The rules, each with its reason:
  brackets    (2,\infty) is not [2,\infty): an end belongs to an interval or it does not
  order       a tuple is ordered, a list or a set is not; (1,2) may answer the list "1, 2", {1,2} may not
              answer (1,2); a column may answer a tuple
  count       a list equals one of as many members, so neither several answers for one nor one for several
  \pm         stands for two values
  x = 3       answers 3, and 3 answers x = 3; where an equation is expected, it or its right-hand side counts,
              and that only where the left one is a name or made of points: AB/CD = 2
  chains      `a = b \approx c` is one answer where it is true: the last member, or the one it is rounded from
  choices     (C), C, C. and "C) 15" are the choice C; where the value 15 is expected, "(C) 15" is 15
  units       may be missing, but not differ; the same holds for the base of a numeral, 1011_2
  words       compare as words: case and punctuation do not matter; before a value only those that say nothing
  regions     inequalities, intervals, unions and set builders are compared as sets of numbers
"""

import re
from collections.abc import Callable
from itertools import accumulate, pairwise, permutations

from rewards.maths.evaluate import TooExpensive, equal, exact, proportional, value
from rewards.maths.expression import Tree, names, parse
from rewards.maths.notation import compact
from rewards.maths.numbers import Number, equal_numbers, plain_number, rounds_to
from rewards.maths.regions import RELATION, SIGNS, region, same_region
from rewards.maths.units import split_unit, strip_words, unit_conflict

Leaf = Callable[[str, str], tuple[float | None, str]]
Verdict = tuple[float | None, str]


class Undecided(Exception):
    """Takes the engine to decide."""


def _verdict(same: bool, equal: str, different: str) -> Verdict:
    return float(same), equal if same else different


_LIST = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*(?:和|或者?)\s*|\s*;\s*|,\s*(?:and|or)\s+")
_MEMBERSHIP = re.compile(r"^\s*(?:[A-Za-z]|\\[a-zA-Z]+)\s*\\in(?![A-Za-z])\s*(?!\\R)(?!\\mathbb)")
_PARAMETER = re.compile(
    r",?\s*(?:\(|where\b|for\b|with\b)?\s*(?:all|any|every|some)?\s*(?:integers?)?\s*[a-z]\s*"
    r"(?:\\in\s*\\mathbb\s*\{?\s*[ZN]\s*\}?|(?:is|are|be) (?:an? )?(?:any )?integers?)\s*\)?$"
)
_NAME = re.compile(r"\s*(?:[A-Za-z]|\\[a-zA-Z]+)(?:_\w|_\s*\{[^{}]*\}|'|\([a-zA-Z0-9, ]*\))*\s*")
_FUNCTION = re.compile(r"\s*([A-Za-z]\w*)\s*\(\s*([a-z])\s*\)\s*")
_EQUALS = re.compile(r"(?<![<>!:])=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])")
_CHOSEN = re.compile(
    r"(?:(?:option|choice|answer(?: choice)?)\s*:?\s*)?(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[).:](?=\s|$))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_MORE_CHOICES = re.compile(r"^(?:and|or|,|/|&)|\(?\b[A-Z]\s*\)|\b(?:not|wrong|incorrect|false)\b")
_MODULUS = re.compile(r"\(?\s*\\?(?:p|b)?mod\s*(?:\{\s*(\w+)\s*\}|(\w+))\s*\)?\s*$")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_BASE = re.compile(r"(-?[0-9A-Za-z.]*\d[0-9A-Za-z]*)\s*_\s*\{?\s*(\d{1,2})\s*\}?")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|inf)\b)[^\W\d_]{3,}")
_OPEN, _CLOSE = "([{", ")]}"
_LIST_LIMIT = 6  # members matched in any order by trying all; beyond that each takes the first that fits
_DEPTH_LIMIT = 8
_INTEGERS = frozenset("klmn")  # names of a parameter that is any integer
_ENGINE = re.compile(r"\\(?:int|sum|prod|lim)(?![A-Za-z])")
# What math-verify understands beside what is parsed here; any other command would be dropped by it.
_ENGINE_KNOWS = frozenset(
    "int sum prod lim to rightarrow infty frac sqrt pi cdot times sin cos tan ln log le".split()
)  # noqa: E501, SIM905


def compare(gold: str, answer: str, leaf: Leaf, depth: int = 0) -> Verdict:
    """Value (1, 0, or `None` where the gold does not parse) and why, of two normalised answers.

    Raises what `leaf` raises.
    """
    gold, answer = (_PARAMETER.sub("", _MEMBERSHIP.sub("", text)) for text in (gold, answer))
    if gold == answer or compact(gold) == compact(answer):
        return 1.0, "equal as written"
    if depth > _DEPTH_LIMIT:
        return 0.0, "nested too deep"
    if (chosen := _choice(gold, answer, leaf, depth)) is not None:
        return chosen
    gold, answer = strip_words(gold), strip_words(answer)
    if (verdict := _regions(gold, answer)) is not None:
        return verdict
    verdict = _by_members(gold, answer, leaf, depth, thousands=True)
    if verdict[0] == 0 and max(len(gold), len(answer)) < 200:
        # The commas of `100,200` may separate thousands or members, that of `1,5` may be a decimal point.
        if any(_THOUSANDS.search(text) for text in (gold, answer)):
            other = _by_members(gold, answer, leaf, depth, thousands=False)
            verdict = other if other[0] == 1 else verdict
        elif _DECIMAL_COMMA.fullmatch(answer) and (number := plain_number(gold)) and number.digits:
            return compare(gold, answer.replace(",", "."), leaf, depth + 1)
    return verdict


def _regions(gold: str, answer: str) -> Verdict | None:
    if not SIGNS.search(gold) and not SIGNS.search(answer):
        return None
    expected, got = region(gold), region(answer)
    if expected is None or got is None:
        if expected is not None and "=" not in answer or got is not None and parse(gold) is not None:
            return 0.0, "a set of numbers against something else"
        return None
    if expected[0] and got[0] and expected[0] != got[0]:
        return 0.0, "another variable"
    return _verdict(same_region(expected[1], got[1]), "equal sets", "different sets")


def _by_members(gold: str, answer: str, leaf: Leaf, depth: int, *, thousands: bool) -> Verdict:
    gold_kind, gold_members = members(gold, thousands)
    answer_kind, answer_members = members(answer, thousands)
    several = len(gold_members) > 1
    if "()" in (gold_kind, answer_kind) and (tuples := (_as_tuple(gold), _as_tuple(answer))) != (
        gold,
        answer,
    ):
        return compare(*tuples, leaf, depth + 1)
    if not several and (len(answer_members) == 1 or RELATION.search(gold)):
        if "{}" in (gold_kind, answer_kind) and len(answer_members) == 1:
            return compare(gold_members[0], answer_members[0], leaf, depth + 1)
        return _single(gold, answer, leaf, depth)
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
    if len({member.partition("=")[0] for member in gold_members if "=" in member}) == len(gold_members):
        ordered = ordered or not _EQUALS.search(answer)  # x = 1, y = 2 against 2, 1
    return _all_equal(gold_members, answer_members, ordered, leaf, depth)


def members(text: str, thousands: bool = True) -> tuple[str, list[str]]:
    """Its outer brackets (`()`, `[)`, `{}` for a set, or none) and the parts between its top-level commas.

    With `thousands`, a comma before three digits is part of a number. `(a, b) = (1, 2)` is `(a = 1, b = 2)`.
    """
    text = _assigned(_LIST.sub(", ", text.strip()))
    text = text.replace("\\{", "{<").replace("\\}", ">}")
    kind = ""
    braces = text.startswith("{<")
    if text and text[0] in ("{" if braces else "([") and text[-1] in _CLOSE and _wraps(text):
        if braces or ("," in text and not _PLUS_MINUS.search(text)):
            kind = text[0] + text[-1]
            text = text[1:-1].removeprefix("<").removesuffix(">")
        thousands = thousands and ", " in text  # (1,234) is a pair
    parts = [part for part in _split(text, thousands) if part]
    expanded = [sign for part in parts for sign in _signs(part)]
    restored = [part.replace("{<", "\\{").replace(">}", "\\}") for part in expanded]
    return kind, restored or [text]


def _assigned(text: str) -> str:
    left, sign, right = text.partition("=")
    if not sign or "=" in right or not left.strip().startswith("(") or not right.strip().startswith("("):
        return text
    named, given = (_split(side.strip()[1:-1], False) for side in (left, right))
    if len(named) != len(given) or len(given) < 2:
        return text
    return "(" + ", ".join(f"{name}={it}" for name, it in zip(named, given, strict=True)) + ")"


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
    r"""`3 \pm 2` is two values, each as it would be written alone; all its signs change together."""
    if not _PLUS_MINUS.search(part):
        return [part]
    both = [_PLUS_MINUS.sub(lambda sign: signs[sign[1] == "mp"], part) for signs in ("+-", "-+")]
    return [re.sub(r"(^|[(=,])\s*\+\s*", r"\1", text).strip() for text in both]


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
    if got and _MORE_CHOICES.search(got[3]):
        return None
    said = (
        (got[1] or got[2]).upper() if got else answer.upper() if len(answer) == 1 and answer.isalpha() else ""
    )
    if len(gold) == 1 and "A" <= gold <= "Z":
        return _verdict(said == gold, "same choice", "another choice") if said else None
    if expected and expected[3]:
        if not said:
            return compare(expected[3].strip(), answer, leaf, depth + 1)
        return _verdict(said == (expected[1] or expected[2]).upper(), "same choice", "another choice")
    if got and got[3] and not expected:
        return compare(gold, got[3].strip(), leaf, depth + 1)
    return None


def _single(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict:
    if plain_number(gold) and plain_number(answer):
        return leaf(gold, answer)
    if (verdict := _relations(gold, answer, leaf, depth)) is not None:
        return verdict
    gold_bare, gold_unit = split_unit(gold)
    answer_bare, answer_unit = split_unit(answer)
    if gold_unit or answer_unit:
        if unit_conflict(gold_unit, answer_unit):
            return 0.0, "another unit"
        return compare(gold_bare, answer_bare, leaf, depth + 1)
    verdict = (
        _bases(gold, answer) or _matrices(gold, answer, leaf, depth) or _ratios(gold, answer, leaf, depth)
    )
    return verdict or leaf(gold, answer)


def _relations(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict | None:
    """The verdict where one of them is an equation, or an inequality with variables on both sides."""
    expected, got = _EQUALS.split(gold), _EQUALS.split(answer)
    if len(expected) == 2 == len(got):
        return _equations(expected, got, leaf, depth)
    if len(expected) >= 2 and (len(got) == 1 or _NAME.fullmatch(expected[0])):
        if len(expected) == 2 and not _is_quantity(expected[0]):
            return 0.0, "an equation is expected"
        return compare(expected[-1].strip(), answer, leaf, depth + 1)
    if len(got) >= 2:
        return _chain(gold, answer, leaf, depth)
    expected, got = RELATION.split(gold), RELATION.split(answer)
    if len(expected) == len(got) > 1:
        return _inequalities(gold, answer)
    if len(expected) == 3 or len(got) == 3:  # a < x < a + 1 against (a, a + 1)
        texts = [_as_interval(text) for text in (gold, answer)]
        return compare(texts[0], texts[1], leaf, depth + 1) if texts != [gold, answer] else None
    return (0.0, "a relation is no value") if len(expected) != len(got) else None


def _is_quantity(left: str) -> bool:
    """Whether an equation's left side is what is asked for: a name, words, or made of points, `AB/CD`."""
    bare = re.sub(r"\\[A-Za-z]+", "", left)
    return bool(_NAME.fullmatch(left)) or not re.search(r"[a-z]", bare) or bool(_WORD.search(bare))


def _equations(expected: list[str], got: list[str], leaf: Leaf, depth: int) -> Verdict:
    if compact(expected[0]) == compact(got[0]):
        return compare(expected[1].strip(), got[1].strip(), leaf, depth + 1)
    function, other = _FUNCTION.fullmatch(expected[0]), _FUNCTION.fullmatch(got[0])
    if function and other and function[1] == other[1] and function[2] != other[2]:
        right = re.sub(rf"(?<![\\A-Za-z]){other[2]}(?![A-Za-z])", function[2], got[1])
        return compare(expected[1].strip(), right.strip(), leaf, depth + 1)
    trees = [parse(side.strip()) for side in (*expected, *got)]
    if None in trees:
        if None in trees[:2]:
            return None, "the gold answer does not parse"
        return 0.0, "the answer is no expression that is understood completely"
    first, second = (("add", trees[i], ("neg", trees[i + 1])) for i in (0, 2))
    try:
        return _verdict(proportional(first, second), "equal equations", "different equations")
    except TooExpensive as error:
        return 0.0, f"too expensive to evaluate: {error}"


def _inequalities(gold: str, answer: str) -> Verdict | None:
    """`a < b` against `b - a > 0`, side by side where there are more of them."""
    sides, signs = [], []
    for text in (gold, answer):
        parts, relations = [parse(part.strip()) for part in RELATION.split(text)], RELATION.findall(text)
        if None in parts:
            return None
        sides.append([("add", a, ("neg", b)) for a, b in pairwise(parts)])
        signs.append(relations)
    if {"<", "\\le"}.isdisjoint(signs[0]) != {"<", "\\le"}.isdisjoint(signs[1]):
        flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
        signs[1] = [flipped.get(sign, sign) for sign in signs[1]][::-1]
        sides[1] = [("neg", side) for side in sides[1]][::-1]
    try:
        same = signs[0] == signs[1] and all(
            proportional(a, b, positive="\\ne" not in signs[0]) for a, b in zip(*sides, strict=True)
        )
    except TooExpensive as error:
        return 0.0, f"too expensive to evaluate: {error}"
    return _verdict(same, "equal inequalities", "different inequalities")


def _as_interval(text: str) -> str:
    sides, signs = RELATION.split(text), RELATION.findall(text)
    if signs and signs[0] in (">", "\\ge"):
        sides, signs = sides[::-1], [{">": "<", "\\ge": "\\le"}.get(sign, sign) for sign in signs[::-1]]
    if len(sides) != 3 or not set(signs) <= {"<", "\\le"} or not _NAME.fullmatch(sides[1]):
        return text
    return ("(" if signs[0] == "<" else "[") + f"{sides[0]}, {sides[2]}" + (")" if signs[1] == "<" else "]")


def _chain(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict:
    """`a = b \\approx c` as an answer: its last member, or the one before it where that is it, rounded."""
    modulus = _MODULUS.search(answer)
    parts = [part.strip() for part in _EQUALS.split(answer[: modulus.start()] if modulus else answer)]
    if not parts[-1]:
        return 0.0, "empty answer"
    below = parse(modulus[1] or modulus[2]) if modulus else None
    modulo = exact(below) if below else None
    rounded = False
    for i, (before, after) in enumerate(pairwise(parts)):
        a, b = parse(before), parse(after)
        if a is None or b is None or names(a) or names(b):
            continue
        first, second = exact(a), exact(b)
        if "\\equiv" in answer and first is not None and second is not None:
            true = not modulo or (first - second) % modulo == 0
            true = true and (after != parts[-1] or modulo is None or 0 <= second < modulo)
        else:
            number = plain_number(after)
            rounded = number is not None and _is_rounding(a, number)
            true = rounded or _equal(a, b)
        # `2 * 3 = 2^3 + 3^2 = 17` explains a sign of the problem's own
        if not true and (i > 0 or len(parts) < 3 or plain_number(before)):
            return 0.0, "a false equation"
    verdict = compare(gold, parts[-1], leaf, depth + 1)
    return compare(gold, parts[-2], leaf, depth + 1) if verdict[0] == 0 and rounded else verdict


def _equal(a: Tree, b: Tree) -> bool:
    try:
        return equal(a, b)
    except TooExpensive:
        return False


def _is_rounding(tree: Tree, number: Number) -> bool:
    """Whether a number, of two digits at least, is an expression rounded to its last place."""
    if number.digits is None:
        zeros = len(str(number.value)) - len(str(number.value).rstrip("0"))
        number = Number(number.value, -zeros, False, "")
    rational = exact(tree)
    found = value(tree) if rational is None else rational
    return (
        found is not None and not found.imag and found != number.value and rounds_to(found.real, number, 10)
    )


def _matrices(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict | None:
    """Matrices entry by entry; round or square brackets do not matter, bars (a determinant) do."""
    expected, got = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(answer)
    if expected and got and (expected[1] in ("vmatrix", "Vmatrix")) == (got[1] in ("vmatrix", "Vmatrix")):
        rows = [[row.split("&") for row in _rows(m[2])] for m in (expected, got)]
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return 0.0, "another shape"
        entries = [[entry.strip() for row in matrix for entry in row] for matrix in rows]
        return _all_equal(entries[0], entries[1], True, leaf, depth)
    return (0.0, "a matrix is not a number") if expected or got else None


def _as_tuple(text: str) -> str:
    """A column as a tuple."""
    column = _MATRIX.fullmatch(text)
    return "(" + ", ".join(_rows(column[2])) + ")" if column and "&" not in column[2] else text


def _rows(body: str) -> list[str]:
    return [row.strip() for row in re.split(r"\\\\", body) if row.strip()]


def _ratios(gold: str, answer: str, leaf: Leaf, depth: int) -> Verdict | None:
    """`2:3` as the quotient 2/3; of more members each."""
    expected, got = gold.split(":"), answer.split(":")
    if len(expected) < 2 and len(got) < 2:
        return None
    if len(expected) == len(got) and (verdict := _all_equal(expected, got, True, leaf, depth))[0] != 0:
        return verdict
    if max(len(expected), len(got)) == 2 and all(parts[-1].strip(" 0") for parts in (expected, got)):
        quotients = [
            "/".join(f"({part})" for part in parts) if len(parts) > 1 else parts[0]
            for parts in (expected, got)
        ]
        return leaf(quotients[0], quotients[1])
    return 0.0, "another ratio"


def _bases(gold: str, answer: str) -> Verdict | None:
    """Numerals with a base: `1011_2`. The base may be left out, but not be another."""
    expected, got = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if not expected and not got:
        return None
    if expected and got and expected[2] != got[2]:
        return 0.0, "another base"
    digits = (expected[1] if expected else compact(gold), got[1] if got else compact(answer))
    if not all(re.fullmatch(r"-?[0-9A-Za-z.]+", part) for part in digits):
        return 0.0, "a numeral is not an expression"
    same = digits[0].lstrip("0").casefold() == digits[1].lstrip("0").casefold()
    return _verdict(same, "same digits", "other digits")


def quick_leaf(gold: str, answer: str) -> Verdict:
    """The verdict on two single expressions; raises `Undecided` where it takes the engine."""
    a, b = plain_number(gold), plain_number(answer)
    if a and b:
        return _verdict(equal_numbers(a, b), "equal numbers", "different numbers")
    if is_words(gold):
        return _verdict(_letters(gold) == _letters(answer), "equal words", "different words")
    expected, got = parse(gold), parse(answer)
    if expected is None or got is None:
        if any(_ENGINE.search(text) for text in (gold, answer)):
            raise Undecided
        if expected is None and any(map(str.isalnum, gold)):
            return None, "the gold answer does not parse"
        return 0.0, "the answer is no expression that is understood completely"
    try:
        return _verdict(_equal_or_rounded(expected, got, a, b), "equal expressions", "different values")
    except TooExpensive as error:
        try:
            equal(expected, expected)
        except TooExpensive:
            return None, f"the gold answer is too expensive to evaluate: {error}"
        return 0.0, f"the answer is too expensive to evaluate: {error}"


def _equal_or_rounded(gold: Tree, answer: Tree, a: Number | None, b: Number | None) -> bool:
    if equal(gold, answer):
        return True
    written, other, least = (a, answer, 100) if a else (b, gold, 100_000)
    if written is not None and written.digits and (a is None or b is None):
        found = value(other)
        return found is not None and not found.imag and rounds_to(found.real, written, least)
    free = names(gold), names(answer)
    if [len(name) for name in free] == [1, 1] and free[0] | free[1] <= _INTEGERS and free[0] != free[1]:
        (new,), (old,) = free  # 2 pi k and 2 pi n: any integer, by whatever name
        return "pi" in str(gold) and equal(gold, _renamed(answer, old, new))
    return False


def _renamed(tree: Tree, old: str, new: str) -> Tree:
    if tree == ("variable", old):
        return ("variable", new)
    return tuple(_renamed(part, old, new) if isinstance(part, tuple) else part for part in tree)


def engine_reads(text: str) -> bool:
    """Whether every command in it is known to the engine, which drops what it does not know."""
    return all(command in _ENGINE_KNOWS for command in re.findall(r"\\([A-Za-z]+)", text)) and not re.search(
        r"\\[^A-Za-z]|[?&@#`\"']", text
    )


def is_words(text: str) -> bool:
    """Whether an answer is words (`Evelyn`, `even`, `C`) rather than an expression."""
    if len(text) == 1:
        return text.isupper() and text.isascii()
    letters = text.replace(" ", "").replace("-", "").replace("'", "")
    if len(letters) > 2 and letters.isalpha() and parse(text) is None:
        return True
    return _WORD.search(text) is not None and (letters.isalpha() or parse(text) is None)


def _letters(text: str) -> str:
    return re.sub(r"[\s.,;:!()\"'*-]+", "", text).casefold()
