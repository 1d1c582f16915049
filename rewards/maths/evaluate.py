r"""Evaluate expressions, to settle whether two of them are equal. Cost is bounded, so no child process is needed.

Rational expressions are computed in fractions at random points, so two that agree at three of them agree
everywhere but for a chance below 1e-9 (Schwartz-Zippel). The others are computed to 300 digits and agree where
they do to 200, relatively: `e^{-800}` is not `e^{-801}`. A term below 1e-100 of its sum would be invisible, so
such a sum has no value here. With variables, they must agree at every point where both are real.

Notation that has two readings is compared in each, both sides alike: an odd root of a negative number (real or
principal), `\log` (natural or decimal), a degree sign (a factor of pi/180 or none), a percent sign (1/100 or 1).
"""

import threading
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

from mpmath import MPContext

from rewards.maths.expression import Tree, has, names

_DIGITS, _QUICK_DIGITS, _SAME_DIGITS = 300, 40, 200
_MOST_BITS = 1 << 14  # of a power or factorial computed exactly
_LARGEST_EXPONENT = 1 << 40
_LARGEST_ANGLE_BITS = 2000
_LARGEST_FACTORIAL = 10_000
_PRIMES = (
    1_000_003,
    998_244_353,
    754_974_721,
)  # variables take residues by these: chance agreement is remote
_RANGES = ((0.4, 1.0), (1.1, 3.0), (3.0, 7.0), (-1.0, -0.2), (-6.0, -1.2), (7.0, 30.0))  # then these
_READINGS = {"root": "power", "log": "log", "degree": "degree", "percent": "percent"}

Values = dict[str, Any]


class TooExpensive(ArithmeticError):
    """Beyond what is computed here."""


class _Irrational(Exception):
    """Needs floating point."""


class _Contexts(threading.local):
    """mpmath's contexts, one set a thread: mpmath changes their precision while it works."""

    def __init__(self) -> None:
        self.precise, self.quick = MPContext(), MPContext()
        self.precise.dps, self.quick.dps = _DIGITS, _QUICK_DIGITS


_contexts = _Contexts()


def equal(first: Tree, second: Tree) -> bool:
    """Whether two expressions are equal.

    Raises:
        TooExpensive: one of them has no value here.
    """
    return _compare(first, second, lambda pairs: all(_same(a, b) for a, b in pairs))


def proportional(first: Tree, second: Tree, *, positive: bool = False) -> bool:
    """Whether one is the other times a constant: as equations `first = 0` and `second = 0` are the same."""

    def constant(pairs: list[tuple[Any, Any]]) -> bool:
        ratios = [a / b for a, b in pairs if a or b]  # ZeroDivisionError where only one of them is zero
        return bool(ratios) and all(
            _same(ratio, ratios[0]) and ratio and (not positive or ratio.real > 0) for ratio in ratios
        )

    try:
        return _compare(first, second, constant)
    except ZeroDivisionError:
        return False


def value(tree: Tree) -> Any | None:
    """The value of an expression without variables, as an mpmath number; `None` where it has none."""
    if names(tree):
        return None
    try:
        return _clean(_Evaluation(_contexts.precise, {}, "").of(tree))
    except (ArithmeticError, ValueError):
        return None


def exact(tree: Tree) -> Fraction | None:
    """The value of a rational expression without variables."""
    try:
        return None if names(tree) else _exact(tree, None)
    except (_Irrational, ArithmeticError):
        return None


def _compare(first: Tree, second: Tree, agree: Callable[[list[tuple[Any, Any]]], bool]) -> bool:
    try:
        points = range(3 if names(first) or names(second) else 1)
        return agree([(_exact(first, trial), _exact(second, trial)) for trial in points])
    except _Irrational:
        pass
    except ZeroDivisionError:
        if not (names(first) or names(second)):
            raise TooExpensive("a division by zero") from None
    free = names(first) | names(second)
    for reading in _readings(first, second):
        if agree(list(_pairs(first, second, free, reading, _contexts.quick, 1))):
            pairs = list(_pairs(first, second, free, reading, _contexts.precise, len(_RANGES)))
            if len(pairs) > bool(free) and agree(pairs):
                return True
    return False


def _readings(first: Tree, second: Tree) -> Iterator[str]:
    yield ""
    yield from (name for name, sign in _READINGS.items() if has(first, sign) or has(second, sign))


def _pairs(
    first: Tree, second: Tree, free: set[str], reading: str, context: Any, most: int
) -> Iterator[tuple[Any, Any]]:
    """The values of both at up to `most` points where both have one."""
    complex_too = not free or has(first, "i") or has(second, "i")
    whole = any(has(tree, name) for tree in (first, second) for name in ("factorial", "binom"))
    found, failed = 0, None
    for trial in range(len(_RANGES) if free else 1):
        evaluation = _Evaluation(context, _point(context, free, trial, whole), reading)
        try:
            a, b = (_clean(evaluation.of(tree)) for tree in (first, second))
        except (ZeroDivisionError, ValueError) as error:
            failed = error
            continue
        if complex_too or (not a.imag and not b.imag):
            found += 1
            yield a, b
        if found == most:
            return
    if failed is not None and not free:
        raise TooExpensive(str(failed))


@cache
def _unit(name: str, trial: int) -> Fraction:
    return Fraction(zlib.crc32(f"{name} {trial}".encode()) % 999_983, 999_983)


def _point(context: Any, free: set[str], trial: int, whole: bool) -> Values:
    if whole:
        return {name: context.mpf(4 + trial + int(20 * _unit(name, trial))) for name in free}
    low, high = _RANGES[trial]
    return {name: low + (high - low) * context.mpf(_unit(name, trial).numerator) / 999_983 for name in free}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    context = (b if isinstance(a, Fraction) else a).context
    digits = _SAME_DIGITS if context.dps >= _DIGITS else _QUICK_DIGITS // 2
    if context.isinf(a) or context.isinf(b):
        return bool(a == b)
    return bool(abs(a - b) <= max(abs(a), abs(b)) * context.mpf(10) ** -digits)


def _clean(number: Any) -> Any:
    """Without an imaginary or a real part that is only rounding."""
    context = number.context
    if not context.isfinite(number) and not (context.isinf(number) and not number.imag):
        raise ValueError("no number")
    if number.imag and abs(number.imag) < abs(number) * context.eps**0.7:
        return number.real
    return number.real if not number.imag else number


def _exact(tree: Tree, trial: int | None) -> Fraction:
    operation, *parts = tree
    if operation == "number":
        return Fraction(parts[0])
    if operation == "variable" and trial is not None:
        return Fraction(zlib.crc32(parts[0].encode()) * (trial + 2) ** 5 % _PRIMES[trial])
    if operation not in ("add", "multiply", "neg", "inverse", "factorial", "power"):
        raise _Irrational
    if operation == "power":
        return _exact_power(_exact(parts[0], trial), _exact(parts[1], trial))
    values = [_exact(part, trial) for part in parts]
    result = values[0]
    if operation == "add":
        return sum(values, Fraction(0))
    if operation == "neg":
        return -result
    if operation == "inverse":
        return 1 / result
    if operation == "factorial":
        if trial is not None and result > 1000 or result.denominator != 1 or not 0 <= result <= 1500:
            raise _Irrational
        for number in range(1, int(result) + 1):
            values[0] = values[0] * number if number > 1 else Fraction(1)
        return values[0] if result else Fraction(1)
    for factor in values[1:]:
        result *= factor
    return result


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent.numerator) > _MOST_BITS or (not base and exponent <= 0):
        raise _Irrational
    if exponent.denominator == 1:
        return Fraction(base**exponent.numerator)
    if base < 0 or exponent.denominator > 64:
        raise _Irrational
    root = Fraction(
        *(_integer_root(part, exponent.denominator) for part in (base.numerator, base.denominator))
    )
    return Fraction(root**exponent.numerator)


def _integer_root(number: int, degree: int) -> int:
    """The root of a number that is a perfect power."""
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    if low**degree != number:
        raise _Irrational
    return low


class _Evaluation:
    """Values of trees at one point, in one reading ("" or a key of `_READINGS`)."""

    def __init__(self, context: Any, values: Values, reading: str) -> None:
        self.context, self.values, self.reading = context, values, reading

    def of(self, tree: Tree) -> Any:
        context = self.context
        operation, *parts = tree
        if operation == "number":
            return context.mpf(parts[0].numerator) / parts[0].denominator
        if operation == "variable":
            return self.values[parts[0]]
        if operation == "constant":
            return {"pi": +context.pi, "e": +context.e, "i": context.j, "inf": context.inf}[parts[0]]
        if operation == "power":
            return self.power(*parts)
        numbers = [self.of(part) for part in parts]
        first = numbers[0]
        match operation:
            case "add":
                return self.add(numbers)
            case "multiply":
                return context.fprod(numbers)
            case "neg":
                return -first
            case "inverse":
                return 1 / first
            case "abs":
                return abs(first)
            case "floor" | "ceil":
                return getattr(context, operation)(self.real(first))
            case "factorial" | "binom":
                if max(abs(number) for number in numbers) > _LARGEST_FACTORIAL:
                    raise TooExpensive("a factorial of a large number")
                if any(number != context.floor(number.real) for number in numbers):
                    raise ValueError("a factorial of a fraction")
                return getattr(context, {"factorial": "factorial", "binom": "binomial"}[operation])(*numbers)
            case "percent":
                return first if self.reading == "percent" else first / 100
            case "degree":
                return first if self.reading != "degree" else first * context.pi / 180
            case "log":
                if len(parts) > 1:
                    return context.ln(first) / context.ln(numbers[1])
                return context.ln(first) / (context.ln(10) if self.reading == "log" else 1)
        return self.function(operation, first)

    def function(self, name: str, number: Any) -> Any:
        context = self.context
        bits = context.mag(number) if number else 0
        if name in ("exp", "sinh", "cosh", "tanh"):
            if bits > 40:
                raise TooExpensive("an exponential of a large number")
        elif bits > _LARGEST_ANGLE_BITS:
            raise TooExpensive("a function of a large number")
        result = getattr(context, name)(number)
        if abs(result) < context.eps**0.8 and (not number or bits > -100):
            return context.mpf(0)  # sin(pi)
        return result

    def add(self, terms: list[Any]) -> Any:
        total, largest = self.context.fsum(terms), max(map(abs, terms))
        if self.context.isinf(largest):
            return total
        if any(term and abs(term) < largest * self.context.mpf(10) ** -100 for term in terms):
            raise TooExpensive("a sum with a term too small to see")
        return total if abs(total) > largest * self.context.eps**0.8 else self.context.mpf(0)

    def power(self, base_tree: Tree, exponent_tree: Tree) -> Any:
        context = self.context
        base, exponent = self.of(base_tree), self.of(exponent_tree)
        if not base:
            if not exponent.real > 0:
                raise ZeroDivisionError
            return context.mpf(0)
        if context.isinf(base) or context.isinf(exponent):
            raise ValueError("infinite")
        if base != 1 and exponent and context.mag(exponent) + context.mag(context.ln(base) or 1) > 40:
            raise TooExpensive("a power beyond all bounds")
        if not exponent.imag and exponent.real == context.floor(exponent.real):
            return base ** int(exponent.real)
        if self.reading != "root" and not base.imag and base.real < 0:
            rational = exact(exponent_tree)
            if rational is not None and rational.denominator % 2:
                sign = -1 if rational.numerator % 2 else 1
                return sign * context.power(-base.real, exponent)
        return context.power(base, exponent)

    @staticmethod
    def real(number: Any) -> Any:
        if number.imag:
            raise ValueError("not real")
        return number.real
