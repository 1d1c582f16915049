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

import math
import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from string import ascii_letters

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\S")
_LETTERS = frozenset(ascii_letters)
_MOST_TOKENS = 301
_MOST_BITS = 1 << 14  # of a power or factorial computed exactly
# Variables take these values, by name and trial: large primes' residues, so that chance agreement is remote.
_PRIMES = (1_000_003, 998_244_353, 754_974_721)

Value = Fraction | complex
Tree = tuple  # ("number", Fraction) | ("variable", name) | ("constant", name) | (operation, Tree, ...)


class _Unsupported(ValueError):
    """Not in the part of LaTeX that is evaluated here."""


class _Irrational(Exception):
    """Needs floating point."""


def differ_or_equal(first: str, second: str) -> bool | None:
    """`True` where two normalised expressions are equal for certain, `False` where they differ; or `None`."""
    a, b = _parse(first), _parse(second)
    if a is None or b is None:
        return None
    with suppress(ArithmeticError, ValueError):
        try:
            # The names take the same values in both; three points, each exact.
            return all(_evaluate(a, trial, True) == _evaluate(b, trial, True) for trial in range(3))
        except _Irrational:
            for trial in range(2):
                x, y = complex(_evaluate(a, trial, False)), complex(_evaluate(b, trial, False))
                gap, size = abs(x - y), max(abs(x), abs(y))
                if math.isfinite(size) and gap > 1e-5 and gap > 1e-5 * size:
                    return False
    return None


def readable(text: str) -> bool:
    """Whether it is in the part of LaTeX that is evaluated here."""
    return _parse(text) is not None


def value_of(text: str) -> complex | None:
    """The number that an expression without variables stands for, in floating point."""
    tree = _parse(text)
    with suppress(ArithmeticError, ValueError):
        return None if tree is None else complex(_evaluate(tree, None, False))
    return None


@lru_cache(maxsize=4096)
def _parse(text: str) -> Tree | None:
    tokens = _TOKEN.findall(text)
    if len(tokens) > _MOST_TOKENS:
        return None
    parser = _Parser(tokens)
    try:
        tree = parser.sum()
    except (_Unsupported, RecursionError):
        return None
    return tree if parser.at == len(tokens) else None


class _Parser:
    """Recursive descent over the tokens; raises `_Unsupported` for whatever is not plain."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = [*tokens, ""], 0, 0

    def take(self, *symbols: str) -> str:
        """The next token if it is one of `symbols`, else ""."""
        token = self.tokens[self.at]
        if token not in symbols:
            return ""
        self.at += 1
        return token

    def between(self, start: str, end: str) -> Tree:
        """The expression in brackets that comes next."""
        if not self.take(start):
            raise _Unsupported
        inner = self.sum()
        if not self.take(end):
            raise _Unsupported
        return inner

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > 40:
            raise _Unsupported
        terms = [self.term()]
        while sign := self.take("+", "-"):
            term = self.term()
            terms.append(("neg", term) if sign == "-" else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self) -> Tree:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        factors, divided = [self.power()], False
        while True:
            if self.take("*", r"\cdot", r"\times"):
                factors.append(self.power())
            elif self.take("/"):
                factors.append(("inverse", self.power()))
                divided = True
            elif (
                (token := self.tokens[self.at]) in _LETTERS
                or _is_number(token)
                or token[:1] in ("\\", "(", "{")
            ):
                before = self.tokens[self.at - 1]
                mixed = _is_number(token) or (_is_number(before) and token == r"\frac")  # 3 1/2 and 3\frac12
                if divided or mixed or (before in _LETTERS and token == "("):  # 1/2x; f(x)
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
        if not self.take("^"):
            return base
        token = self.tokens[self.at]
        if token == "{":
            return ("power", base, self.between("{", "}"))
        if token not in _LETTERS and not (_is_number(token) and len(token) == 1):
            raise _Unsupported  # x^23 is x^2 times 3 in LaTeX, and x to the 23rd elsewhere
        return ("power", base, self.atom())

    def atom(self) -> Tree:
        token = self.tokens[self.at]
        if token in ("(", "{"):
            return self.between(token, ")" if token == "(" else "}")
        self.at += 1
        if _is_number(token) and len(token) <= 400:
            return ("number", Fraction(token))
        if token in _LETTERS:
            return ("constant" if token in "ei" else "variable", token)
        if token == r"\pi":
            return ("constant", "pi")
        if token == r"\frac":
            return ("multiply", self.between("{", "}"), ("inverse", self.between("{", "}")))
        if token == r"\sqrt":
            degree = self.between("[", "]") if self.tokens[self.at] == "[" else ("number", Fraction(2))
            return ("root", self.between("{", "}"), degree)
        raise _Unsupported


def _is_number(token: str) -> bool:
    return token[-1:].isdecimal()


def _evaluate(tree: Tree, trial: int | None, exact: bool) -> Value:
    """The value, a fraction where `exact`, with the variables at their values of `trial`."""
    operation, *parts = tree
    match operation:
        case "number":
            return parts[0] if exact else complex(parts[0])
        case "variable":
            if trial is None:
                raise _Unsupported
            residue = (7 + ord(parts[0])) ** (5 + trial) % _PRIMES[trial % 3]
            return Fraction(residue) if exact else complex(1 + (residue % 9973) / 9973)
        case "constant":
            if exact:
                raise _Irrational
            return {"e": complex(math.e), "pi": complex(math.pi), "i": 1j}[parts[0]]
    values: list = [_evaluate(part, trial, exact) for part in parts]
    match operation:
        case "add":
            return sum(values, Fraction(0) if exact else 0j)
        case "multiply":
            return math.prod(values, start=Fraction(1) if exact else 1 + 0j)
        case "neg":
            return -values[0]
        case "inverse":
            return 1 / values[0]
        case "factorial":
            return _factorial(values[0], exact)
        case "power":
            return _power(*values) if exact else values[0] ** values[1]
    return _exact_root(*values) if exact else _root(*values)


def _factorial(value: Value, exact: bool) -> Value:
    number = value.real
    if number != int(number) or not 0 <= number <= 170:
        raise _Unsupported
    result = math.factorial(int(number))
    return Fraction(result) if exact else complex(result)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _Irrational
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent.numerator) > _MOST_BITS:
        raise _Unsupported
    return Fraction(base**exponent.numerator)


def _exact_root(radicand: Fraction, degree: Fraction) -> Fraction:
    if degree != 2 or radicand < 0:
        raise _Irrational
    root = Fraction(math.isqrt(radicand.numerator), math.isqrt(radicand.denominator))
    if root * root != radicand:
        raise _Irrational
    return root


def _root(radicand: complex, degree: complex) -> complex:
    if radicand.imag == 0 and radicand.real < 0 and degree.real % 2 == 1:
        return complex(-((-radicand.real) ** (1 / degree.real)))
    return radicand ** (1 / degree)
