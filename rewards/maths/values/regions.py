r"""Sets of real numbers, however they are written: intervals and their unions, inequalities, set builders.

`x \le 0 \text{ or } x = 7` is `(-\infty, 0] \cup \{7\}`. Two sets are the same where they have the same
members among their ends, the points between these and those beyond; the ends are numbers."""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

from rewards.maths.values.evaluate import close, value
from rewards.maths.values.expression import parse

SIGNS = re.compile(r"\\(?:cup|cap|le|ge|ne|setminus|R|emptyset|mid)(?![A-Za-z])|[<>]")
RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>=]")
_BUILDER = re.compile(r"\\\{\s*(\w+)(?:\s*\\in\s*\\R\s*)?\s*(?:\\mid|\||:)(.*)\\\}\s*")
_INTERVAL = re.compile(r"([\[(])([^,]*),([^,]*)([\])])")
_POINTS = re.compile(r"\\\{(.*)\\\}")
_WITHOUT = re.compile(r"\\setminus|(?<=\\R)\s*[-/](?=\s*\\\{)")
_OR = re.compile(r"\\cup(?![A-Za-z])|\bor\b|\\lor(?![A-Za-z])")
_AND = re.compile(r"\\cap(?![A-Za-z])|\band\b|\\land(?![A-Za-z])")
_VARIABLE = re.compile(r"(?!e\b)[A-Za-z](?:_\{?\w+\}?)?|\\(?!pi|infty)[a-z]+")

_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b and not close(a, b),
    ">": lambda a, b: a > b and not close(a, b),
    "\\le": lambda a, b: a < b or close(a, b),
    "\\ge": lambda a, b: a > b or close(a, b),
    "\\ne": lambda a, b: not close(a, b),
    "=": close,
}
Holds = Callable[[Any], bool]


class Region:
    """A set of real numbers. Raises `ValueError`: the text names none, or its ends are no numbers."""

    def __init__(self, text: str) -> None:
        self.ends: list[Any] = []
        self.variable, bound = "", _BUILDER.fullmatch(text)
        self._has = self._any(bound[2] if bound else text)
        self.variable = "" if bound else self.variable

    def same(self, other: "Region") -> bool:
        """Whether both have the same members, and the same variable where both name one."""
        if self.variable and other.variable and self.variable != other.variable:
            return False
        ends = sorted(end for end in self.ends + other.ends if not end.context.isinf(end))
        ends = ends or [value(("number", Fraction(0)))]
        points = [*ends, *((low + high) / 2 for low, high in pairwise(ends)), ends[0] - 1, ends[-1] + 1]
        return all(self._has(point) == other._has(point) for point in points)

    def _any(self, text: str) -> Holds:
        parts = [self._all(part) for part in _OR.split(text)]
        return lambda x: any(part(x) for part in parts)

    def _all(self, text: str) -> Holds:
        if match := _WITHOUT.search(text):
            kept, out = self._any(text[: match.start()]), self._any(text[match.end() :])
            return lambda x: kept(x) and not out(x)
        parts = [self._one(part.strip()) for part in _AND.split(text)]
        return lambda x: all(part(x) for part in parts)

    def _one(self, text: str) -> Holds:
        if text in ("\\R", "\\emptyset"):
            return lambda x: text == "\\R"
        if match := _POINTS.fullmatch(text):
            points = [self._end(point) for point in match[1].split(",")]
            return lambda x: any(close(x, point) for point in points)
        if match := _INTERVAL.fullmatch(text):
            low, high = self._end(match[2]), self._end(match[3])
            if not low < high:
                raise ValueError(text)
            first, last = (_ORDER["<" if bracket in "()" else "\\le"] for bracket in (match[1], match[4]))
            return lambda x: first(low, x) and last(x, high)
        relations = [self._relation(part.strip()) for part in text.split(",")]
        return lambda x: all(relation(x) for relation in relations)

    def _relation(self, text: str) -> Holds:
        """`2 < x \\le 5`, `x \\ne 3`."""
        sides, signs = [side.strip() for side in RELATION.split(text)], RELATION.findall(text)
        at = [i for i, side in enumerate(sides) if _VARIABLE.fullmatch(side)]
        if len(at) != 1 or not 2 <= len(sides) <= 3 or self.variable not in ("", sides[at[0]]):
            raise ValueError(text)
        self.variable = sides[at[0]]
        ends = [None if i == at[0] else self._end(side) for i, side in enumerate(sides)]

        def holds(x: Any) -> bool:
            values = [x if end is None else end for end in ends]
            return all(_ORDER[sign](*pair) for sign, pair in zip(signs, pairwise(values), strict=True))

        return holds

    def _end(self, text: str) -> Any:
        tree = parse(text.strip())
        number = None if tree is None else value(tree)
        if number is None or number.imag:
            raise ValueError(text)
        self.ends.append(number.real)
        return number.real


def region(text: str) -> Region | None:
    """The set of real numbers that a text names, or `None`."""
    try:
        return Region(text)
    except ValueError:
        return None
