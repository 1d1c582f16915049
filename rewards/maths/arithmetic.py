r"""Evaluate a small, unambiguous part of LaTeX, to settle without algebra that two expressions differ.

`+ - * /`, `\frac`, `\sqrt`, powers, factorials, brackets, implicit products, single-letter variables, `\pi`.
Anything else, and whatever graders may read in two ways (`1/2x`, `x^23`, `f(x)`, `3\frac12`), is `None`
here and left to math-verify.

math-verify cannot do this without a worker process, since sympy may hang or run out of memory: without this
module no verdict changes on 73,000 golds and solutions, and one of 472 own pairs does (`a \approx b` for a
gold `a`), but grading takes 5.8 times as long on the 5,000 completions of `tests.bench.rewards_math`, and 4.4
times on wrong answers to MATH.

Rational expressions are computed in fractions, so equality is exact: two that agree at several random
points agree everywhere but for a chance below 1e-9 (Schwartz-Zippel). With roots or pi the values are
floating point, and only say when expressions differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|\\([A-Za-z]+)|([A-Za-z])|([-+*/^(){}\[\]!])|(\S))")
_MOST_TOKENS = 300
_MOST_BITS = 1 << 14  # of a power or factorial computed exactly
# Variables take these values, by name and trial: large primes' residues, so that chance agreement is remote.
_PRIMES = (1_000_003, 998_244_353, 754_974_721)

Value = Fraction | complex


class _Unsupported(Exception):
    """Not in the part of LaTeX that is evaluated here."""


class _Irrational(Exception):
    """Needs floating point."""


def differ_or_equal(first: str, second: str) -> bool | None:
    """`True` where two normalised expressions are equal for certain, `False` where they differ; or `None`."""
    a, b = _parse(first), _parse(second)
    if a is None or b is None:
        return None
    try:
        # The names take the same values in both; three points, each exact.
        return all(_evaluate(a, trial, exact=True) == _evaluate(b, trial, exact=True) for trial in range(3))
    except _Irrational:
        pass
    except (_Unsupported, ArithmeticError, ValueError):
        return None
    try:
        for trial in range(2):
            x, y = complex(_evaluate(a, trial, exact=False)), complex(_evaluate(b, trial, exact=False))
            gap, size = abs(x - y), max(abs(x), abs(y))
            if math.isfinite(size) and gap > 1e-5 and gap > 1e-5 * size:
                return False
    except (_Unsupported, ArithmeticError, ValueError):
        pass
    return None


def readable(text: str) -> bool:
    """Whether it is in the part of LaTeX that is evaluated here."""
    return _parse(text) is not None


def value_of(text: str) -> complex | None:
    """The number that an expression without variables stands for, in floating point."""
    tree = _parse(text)
    if tree is None or _variables(tree):
        return None
    try:
        return complex(_evaluate(tree, 0, exact=False))
    except (_Unsupported, ArithmeticError, ValueError):
        return None


Tree = tuple  # ("number", Fraction) | ("variable", name) | ("constant", name) | (operation, Tree, ...)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Tree | None:
    tokens: list[tuple[str, str]] = []
    for match in _TOKEN.finditer(text.strip()):
        kind = match.lastindex
        if kind == 5 or len(tokens) > _MOST_TOKENS:
            return None
        tokens.append((("number", "command", "letter", "symbol")[(kind or 1) - 1], match[kind or 1]))
    try:
        parser = _Parser(tokens)
        tree = parser.sum()
        return tree if parser.at == len(tokens) and tokens else None
    except (_Unsupported, RecursionError):
        return None


class _Parser:
    """Recursive descent over the tokens; raises `_Unsupported` for whatever is not plain."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ("end", "")

    def take(self, symbol: str) -> bool:
        if self.peek() == ("symbol", symbol):
            self.at += 1
            return True
        return False

    def need(self, symbol: str) -> None:
        if not self.take(symbol):
            raise _Unsupported

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > 40:
            raise _Unsupported
        terms = [self.term()]
        while self.peek() in (("symbol", "+"), ("symbol", "-")):
            minus = self.peek()[1] == "-"
            self.at += 1
            term = self.term()
            terms.append(("neg", term) if minus else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self) -> Tree:
        negative = False
        while self.peek() in (("symbol", "+"), ("symbol", "-")):
            negative ^= self.peek()[1] == "-"
            self.at += 1
        factors, divided = [self.power()], False
        while True:
            kind, text = self.peek()
            if (kind, text) == ("symbol", "*") or (kind == "command" and text in ("cdot", "times")):
                self.at += 1
                factors.append(self.power())
            elif (kind, text) == ("symbol", "/"):
                self.at += 1
                factors.append(("inverse", self.power()))
                divided = True
            elif kind in ("letter", "number", "command") or (kind == "symbol" and text in "({"):
                before = self.tokens[self.at - 1]
                # 1/2x; 3 1/2 and 3\frac12 (a mixed number); f(x)
                if divided or kind == "number" or (before[0] == "number" and text == "frac"):
                    raise _Unsupported
                if before[0] == "letter" and text == "(":
                    raise _Unsupported
                factors.append(self.power())
            else:
                break
        tree: Tree = factors[0] if len(factors) == 1 else ("multiply", *factors)
        return ("neg", tree) if negative else tree

    def power(self) -> Tree:
        base = self.atom()
        while self.take("!"):
            base = ("factorial", base)
        if self.take("^"):
            if self.take("{"):
                exponent = self.sum()
                self.need("}")
            else:
                kind, text = self.peek()
                if (kind == "number" and len(text) > 1) or kind not in ("number", "letter"):
                    raise _Unsupported  # x^23 is x^2 times 3 in LaTeX, and x to the 23rd elsewhere
                exponent = self.atom()
            base = ("power", base, exponent)
        return base

    def atom(self) -> Tree:
        kind, text = self.peek()
        self.at += 1
        if kind == "number":
            if len(text) > 400:
                raise _Unsupported
            return ("number", Fraction(text))
        if kind == "letter":
            return ("constant", text) if text in "ei" else ("variable", text)
        if kind == "symbol" and text in "({":
            inner = self.sum()
            self.need(")" if text == "(" else "}")
            return inner
        if kind == "command" and text == "pi":
            return ("constant", "pi")
        if kind == "command" and text == "frac":
            top = self.group()
            return ("multiply", top, ("inverse", self.group()))
        if kind == "command" and text == "sqrt":
            degree: Tree = ("number", Fraction(2))
            if self.take("["):
                degree = self.sum()
                self.need("]")
            return ("root", self.group(), degree)
        raise _Unsupported

    def group(self) -> Tree:
        self.need("{")
        inner = self.sum()
        self.need("}")
        return inner


def _variables(tree: Tree) -> frozenset[str]:
    if tree[0] == "variable":
        return frozenset((tree[1],))
    return frozenset().union(*(_variables(part) for part in tree[1:] if isinstance(part, tuple)))


def _evaluate(tree: Tree, trial: int, *, exact: bool) -> Value:
    operation, *parts = tree
    if operation == "number":
        return parts[0] if exact else complex(parts[0])
    if operation == "variable":
        residue = (7 + ord(parts[0])) ** (5 + trial) % _PRIMES[trial % 3]
        return Fraction(residue) if exact else complex(1 + (residue % 9973) / 9973)
    if operation == "constant":
        if exact:
            raise _Irrational
        return {"e": complex(math.e), "pi": complex(math.pi), "i": 1j}[parts[0]]
    values = [_evaluate(part, trial, exact=exact) for part in parts]
    return _OPERATIONS[operation](values, exact)


def _add(values: list[Value], exact: bool) -> Value:
    return sum(values, Fraction(0) if exact else 0j)


def _multiply(values: list[Value], exact: bool) -> Value:
    product: Value = Fraction(1) if exact else 1 + 0j
    for value in values:
        product = product * value
    return product


def _power(values: list[Value], exact: bool) -> Value:
    base, exponent = values
    if not exact:
        return complex(base) ** complex(exponent)
    assert isinstance(base, Fraction) and isinstance(exponent, Fraction)
    if exponent.denominator != 1:
        raise _Irrational
    if _bits(base) * abs(exponent.numerator) > _MOST_BITS:
        raise _Unsupported
    return Fraction(base**exponent.numerator)


def _root(values: list[Value], exact: bool) -> Value:
    radicand, degree = values
    if exact:
        assert isinstance(radicand, Fraction)
        if degree != 2 or radicand < 0:
            raise _Irrational
        top, bottom = math.isqrt(radicand.numerator), math.isqrt(radicand.denominator)
        if top * top != radicand.numerator or bottom * bottom != radicand.denominator:
            raise _Irrational
        return Fraction(top, bottom)
    radicand, degree = complex(radicand), complex(degree)
    if radicand.imag == 0 and radicand.real < 0 and degree.real % 2 == 1:
        return complex(-((-radicand.real) ** (1 / degree.real)))
    return radicand ** (1 / degree)


def _factorial(values: list[Value], exact: bool) -> Value:
    (value,) = values
    number = value.real if isinstance(value, complex) else value
    if number != int(number) or not 0 <= number <= 170:
        raise _Unsupported
    result = math.factorial(int(number))
    return Fraction(result) if exact else complex(result)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length(), 1)


_OPERATIONS: dict[str, Callable[[list[Value], bool], Value]] = {
    "add": _add,
    "multiply": _multiply,
    "neg": lambda values, exact: -values[0],
    "inverse": lambda values, exact: 1 / values[0],
    "power": _power,
    "root": _root,
    "factorial": _factorial,
}
