r"""Evaluate expressions, to settle whether two of them are equal. The cost is bounded: no child is needed.

Rational expressions are computed in fractions at random points: two that agree at three of them agree
everywhere but for a chance below 1e-9 (Schwartz-Zippel). Others are computed to 300 digits and agree where
they do to 200, relatively: `e^{-800}` is not `e^{-801}`. A term below 1e-100 of its sum would not be seen, so
such a sum has no value here. With variables, two expressions must agree at every point where both are real.

Notation that has two readings is compared in each, both sides alike: an odd root of a negative number (real
or principal), `\log` (natural or decimal), a degree sign (a factor of pi/180 or none), a percent sign (1/100
or 1)."""

import math
import threading
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cached_property
from typing import Any

from rewards.maths.values.expression import Tree, has, names

_DIGITS, _SAME_DIGITS = 300, 200
_QUICK_DIGITS, _QUICK_SAME = 40, 20  # one point at these first: most that differ do so there
_MOST_BITS = 1 << 14  # of a power computed exactly
_LARGEST = 40  # bits before the point of an exponent or a function's argument
_LARGEST_FACTORIAL = 10_000
_PRIMES = (1_000_003, 998_244_353, 754_974_721)  # variables take residues: chance agreement is remote
_RANGES = ((0.4, 1.0), (1.1, 3.0), (3.0, 7.0), (-1.0, -0.2), (-6.0, -1.2), (7.0, 30.0))  # then these
_READINGS = {"root": "power", "log": "log", "degree": "degree"}  # and what shows them


class TooExpensive(ArithmeticError):
    """An expression has no value here, or none that is cheap to find."""


class _Irrational(Exception):
    """Takes more than fractions."""


class _Contexts(threading.local):
    """mpmath's contexts, two a thread: mpmath changes their precision while it works."""

    precise = cached_property(lambda self: _context(_DIGITS))
    quick = cached_property(lambda self: _context(_QUICK_DIGITS))


def _context(digits: int) -> Any:
    from mpmath import MPContext  # late: settings import the rewards' names, and need no mathematics

    context = MPContext()
    context.dps = digits
    return context


_contexts = _Contexts()
Pairs = list[tuple[Any, Any]]


def equal(first: Tree, second: Tree) -> bool:
    """Whether two expressions are equal. Raises `TooExpensive`: one of them has no value here."""
    return _compare(first, second, lambda pairs: all(close(a, b) for a, b in pairs))


def proportional(first: Tree, second: Tree, *, positive: bool = False) -> bool:
    """Whether one is the other times a constant: the equations `first = 0` and `second = 0` are the same."""

    def constant(pairs: Pairs) -> bool:
        if not all(b for a, b in pairs if a):
            return False
        ratios = [a / b for a, b in pairs if b]
        same = all(ratio and close(ratio, ratios[0]) and (not positive or ratio.real > 0) for ratio in ratios)
        return bool(ratios) and same

    return _compare(first, second, constant)


def exact(tree: Tree) -> Fraction | None:
    """The value of a rational expression without variables; `None` where it is not one."""
    try:
        return None if names(tree) else _exact(tree, 0)
    except (_Irrational, ArithmeticError):
        return None


def value(tree: Tree) -> Any | None:
    """The value of an expression without variables, as an mpmath number; `None` where it has none."""
    try:
        return None if names(tree) else _clean(_Evaluation(_contexts.precise, {}, "").of(tree))
    except (ArithmeticError, ValueError):
        return None


def close(a: Any, b: Any) -> bool:
    """Whether two values are the same, to the digits that can be trusted."""
    if a == b or (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return bool(a == b)
    context = (b if isinstance(a, Fraction) else a).context
    digits = _SAME_DIGITS if context.dps >= _DIGITS else _QUICK_SAME
    gap = abs(a - b)
    return bool(gap <= max(abs(a), abs(b)) * context.mpf(10) ** -digits) and not context.isinf(gap)


def _compare(first: Tree, second: Tree, agree: Callable[[Pairs], bool]) -> bool:
    free = names(first) | names(second)
    try:
        return agree([(_exact(first, trial), _exact(second, trial)) for trial in range(3 if free else 1)])
    except _Irrational:
        pass
    except ZeroDivisionError:
        if not free:
            raise TooExpensive("a division by zero") from None
    readings = [name for name, sign in _READINGS.items() if has(first, sign) or has(second, sign)]
    if "percent" in (first[0], second[0]):  # of the complete expression, not within it
        readings.append("percent")
    for reading in ("", *readings):
        if agree(list(_pairs(first, second, free, reading, _contexts.quick, 1))):
            pairs = list(_pairs(first, second, free, reading, _contexts.precise, len(_RANGES)))
            if len(pairs) > bool(free) and agree(pairs):
                return True
    return False


def _pairs(
    first: Tree, second: Tree, free: set[str], reading: str, context: Any, most: int
) -> Iterator[tuple[Any, Any]]:
    """The values of both at up to `most` points where both have one."""
    complex_too = not free or has(first, "i") or has(second, "i")
    whole = any(has(tree, name) for tree in (first, second) for name in ("factorial", "binomial"))
    for trial, (low, high) in enumerate(_RANGES if free else _RANGES[:1]):
        values = {}
        for name in free:
            part = context.mpf(zlib.crc32(f"{name} {trial}".encode()) % 999_983) / 999_983
            values[name] = context.floor(4 + trial + 20 * part) if whole else low + (high - low) * part
        evaluation = _Evaluation(context, values, reading)
        try:
            a, b = (_clean(evaluation.of(tree)) for tree in (first, second))
        except (ZeroDivisionError, ValueError) as error:
            if not free:
                raise TooExpensive(f"no value: {error}") from error
            continue
        if complex_too or (not a.imag and not b.imag):
            yield a, b
            most -= 1
        if not most:
            return


def _clean(number: Any) -> Any:
    """Without an imaginary part that is only rounding."""
    context = number.context
    if not (context.isfinite(number) or (context.isinf(number) and not number.imag)):
        raise ValueError("not a number")
    return number.real if abs(number.imag) <= abs(number) * context.eps**0.7 else number


def _exact(tree: Tree, trial: int) -> Fraction:
    operation, *parts = tree
    if operation == "number":
        return Fraction(parts[0])
    if operation == "variable":
        return Fraction(zlib.crc32(parts[0].encode()) * (trial + 2) ** 5 % _PRIMES[trial])
    if operation not in _EXACT:
        raise _Irrational
    values = [_exact(part, trial) for part in parts]
    if operation == "power" and values[1].denominator > 1 and names(parts[0]):  # sqrt(x^2) is not x
        raise _Irrational
    if operation == "factorial" and (values[0].denominator != 1 or not 0 <= values[0] <= 1500):
        raise _Irrational
    return Fraction(_EXACT[operation](values))


def _exact_power(values: list[Fraction]) -> Fraction:
    base, exponent = values
    degree, power = exponent.denominator, exponent.numerator
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (
        bits * abs(power) > _MOST_BITS
        or (not base and exponent <= 0)
        or (degree > 1 and base < 0)
        or degree > 64
    ):
        raise _Irrational
    if degree > 1:
        roots = [round(x ** (1 / degree)) if bits < 900 else 0 for x in (base.numerator, base.denominator)]
        if Fraction(roots[0] ** degree, max(roots[1], 1) ** degree) != base:
            raise _Irrational
        base = Fraction(*roots)
    return Fraction(base**power)


_EXACT: dict[str, Callable[[list[Fraction]], Any]] = {
    "add": sum,
    "multiply": math.prod,
    "neg": lambda values: -values[0],
    "inverse": lambda values: 1 / values[0],
    "factorial": lambda values: math.factorial(int(values[0])),
    "power": _exact_power,
}


class _Evaluation:
    """Values of trees at one point, in one reading ("" or the name of one)."""

    def __init__(self, context: Any, values: dict[str, Any], reading: str) -> None:
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
            case "percent":
                return first if self.reading == "percent" else first / 100
            case "degree":
                return first if self.reading != "degree" else first * context.pi / 180
            case "log":
                base = numbers[1] if len(parts) > 1 else 10 if self.reading == "log" else context.e
                return context.ln(first) / context.ln(base)
            case "factorial" | "binomial":
                if any(abs(it) > _LARGEST_FACTORIAL for it in numbers):
                    raise TooExpensive("a factorial of a large number")
                if any(it != context.floor(it.real) for it in numbers):
                    raise ValueError("a factorial of a fraction")
                return getattr(context, operation)(*numbers)
        if first and context.mag(first) > _LARGEST:
            raise TooExpensive("a function of a large number")
        result = getattr(context, operation)(first)
        # sin(pi) is zero, and only rounding is left of it
        return context.mpf(0) if abs(result) < context.eps**0.8 < abs(first) ** 4 else result

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
        if not base and exponent.real > 0:
            return context.mpf(0)
        if context.isinf(base) or context.isinf(exponent):
            raise ValueError("infinite")
        if base != 1 and exponent and context.mag(exponent) + context.mag(context.ln(base) or 1) > _LARGEST:
            raise TooExpensive("a power beyond all bounds")
        if not exponent.imag and exponent.real == context.floor(exponent.real):
            return base ** int(exponent.real)
        if self.reading != "root" and not base.imag and base.real < 0:
            rational = exact(exponent_tree)
            if rational is not None and rational.denominator % 2:
                return (-1) ** rational.numerator * context.power(-base.real, exponent)
        return context.power(base, exponent)
