r"""Sets of real numbers, however they are written: intervals and their unions, inequalities, set builders.

`x \le 0 \text{ or } x = 7` is `(-\infty, 0] \cup \{7\}`. Their ends are numbers; those with variables in them
are compared as they are written (`compare`).
"""

import re
from typing import Any

from rewards.maths.evaluate import value
from rewards.maths.expression import parse

Interval = tuple[
    Any, bool, Any, bool
]  # low end, whether it belongs to the interval, high end, whether it does

SIGNS = re.compile(r"\\(?:cup|cap|le|ge|ne|setminus|R|emptyset|mid)(?![A-Za-z])|[<>]")
RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>=]")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_BUILDER = re.compile(r"\\\{\s*(\w+)(?:\s*\\in\s*\\R\s*)?\s*(?:\\mid|\||:)(.*)\\\}\s*")
_MEMBERSHIP = re.compile(r"\s*(\w+|\\[a-z]+)\s*\\in(?![A-Za-z])(.*)")
_INTERVAL = re.compile(r"\s*([\[(])([^,]*),([^,]*)([\])])\s*")
_POINTS = re.compile(r"\s*\\\{(.*)\\\}\s*")
_WITHOUT = re.compile(r"\\setminus|\\R\s*-(?=\s*\\\{)|\\R\s*/(?=\s*\\\{)")
_OR = re.compile(r"\\cup(?![A-Za-z])|\bor\b|\\lor(?![A-Za-z])")
_AND = re.compile(r"\band\b|,|\\land(?![A-Za-z])")


class _NoRegion(ValueError):
    """Not written as a set of real numbers with numbers as ends."""


def region(text: str) -> tuple[str, list[Interval]] | None:
    """The variable ("" where none is named or it is bound) and the intervals, in order; or `None`."""
    variables: set[str] = set()
    try:
        return _name(text, variables)
    except _NoRegion:
        return None


def _name(text: str, variables: set[str]) -> tuple[str, list[Interval]]:
    if match := _BUILDER.fullmatch(text):
        return "", _any(match[2], {match[1]})
    if match := _MEMBERSHIP.fullmatch(text):
        return match[1], _any(match[2], variables)
    intervals = _any(text, variables)
    return next(iter(variables), ""), intervals


def _any(text: str, variables: set[str]) -> list[Interval]:
    return _union([interval for part in _OR.split(text) for interval in _all(part, variables)])


def _all(text: str, variables: set[str]) -> list[Interval]:
    if match := _WITHOUT.search(text):
        kept = text[: match.start()] or "\\R"
        return _both(_any(kept, variables), _complement(_any(text[match.end() :], variables)))
    parts = _AND.split(text) if RELATION.search(text) and not _POINTS.fullmatch(text) else [text]
    found = _one(parts[0], variables)
    for part in parts[1:]:
        found = _both(found, _one(part, variables))
    return found


def _one(text: str, variables: set[str]) -> list[Interval]:
    text = text.strip().removesuffix("\\mid").strip()
    if text == "\\R":
        return _complement([])
    if text == "\\emptyset":
        return []
    if match := _POINTS.fullmatch(text):
        return _union([(at, True, at, True) for at in map(_number, match[1].split(","))])
    if match := _INTERVAL.fullmatch(text):
        return _interval(_number(match[2]), match[1] == "[", _number(match[3]), match[4] == "]")
    return _relations(text, variables)


def _relations(text: str, variables: set[str]) -> list[Interval]:
    r"""`2 < x \le 5`, `x \ne 3`."""
    sides, signs = [side.strip() for side in RELATION.split(text)], RELATION.findall(text)
    at = [i for i, side in enumerate(sides) if re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+", side)]
    at = [i for i in at if sides[i] not in ("\\pi", "\\infty", "e")]
    if len(at) != 1 or not 2 <= len(sides) <= 3 or (len(sides) == 3 and at != [1]):
        raise _NoRegion
    variables.add(sides[at[0]])
    if len(variables) > 1:
        raise _NoRegion
    found = _complement([])
    for i, sign in enumerate(signs):
        other = i if i < at[0] else i + 1
        bound = _number(sides[other])
        sign = _FLIPPED[sign] if other < at[0] else sign
        low, high = value(("neg", ("constant", "inf"))), value(("constant", "inf"))
        closed = sign in ("\\le", "\\ge", "=")
        if sign == "\\ne":
            part = _complement([(bound, True, bound, True)])
        elif sign == "=":
            part = [(bound, True, bound, True)]
        elif sign in ("<", "\\le"):
            part = _interval(low, False, bound, closed)
        else:
            part = _interval(bound, closed, high, False)
        found = _both(found, part)
    return found


def _number(text: str) -> Any:
    tree = parse(text.strip())
    number = None if tree is None else value(tree)
    if number is None or number.imag:
        raise _NoRegion
    return number.real


def _interval(low: Any, low_in: bool, high: Any, high_in: bool) -> list[Interval]:
    if low > high or (low == high and not (low_in and high_in)):
        raise _NoRegion
    infinite = low.context.isinf
    return [(low, low_in and not infinite(low), high, high_in and not infinite(high))]


def _union(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for low, low_in, high, high_in in sorted(intervals, key=lambda it: (it[0], not it[1])):
        if merged and (low < merged[-1][2] or (low == merged[-1][2] and (low_in or merged[-1][3]))):
            before = merged[-1]
            end = max((before[2], before[3]), (high, high_in))
            merged[-1] = (*before[:2], *end)
        else:
            merged.append((low, low_in, high, high_in))
    return merged


def _complement(intervals: list[Interval]) -> list[Interval]:
    infinity = value(("constant", "inf"))
    assert infinity is not None
    ends = [(-infinity, True)]
    for low, low_in, high, high_in in _union(intervals):
        ends += [(low, low_in), (high, high_in)]
    ends.append((infinity, True))
    return [
        (low, not low_in, high, not high_in)
        for (low, low_in), (high, high_in) in zip(ends[::2], ends[1::2], strict=True)
        if low < high or (low == high and not low_in and not high_in)
    ]


def _both(first: list[Interval], second: list[Interval]) -> list[Interval]:
    return _complement(_union(_complement(first) + _complement(second)))


def same_region(first: list[Interval], second: list[Interval]) -> bool:
    """Whether two sets have the same intervals."""

    def close(a: Any, b: Any) -> bool:
        return bool(a == b or abs(a - b) <= max(abs(a), abs(b)) * a.context.mpf(10) ** -200)

    return len(first) == len(second) and all(
        close(a[0], b[0]) and close(a[2], b[2]) and a[1] == b[1] and a[3] == b[3]
        for a, b in zip(first, second, strict=True)
    )
