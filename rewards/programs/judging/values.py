"""Values on the wire between a test and the program under test, as JSON; nothing that arrives is executed.

Plain data (numbers, text, containers, dates, arrays) goes by value, and by its *base type's* value: a list
whose class says that it equals everything arrives as the list it is. Everything else stays where it is, and a
reference goes over. So an answer is compared in the test's process, by Python's own equality.
"""

import collections
import datetime
import decimal
import fractions
import functools
import importlib
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

# Modules whose functions and classes may be named instead of sent.
SAFE_MODULES = frozenset(
    "math cmath itertools functools operator collections re string statistics heapq bisect copy decimal "  # noqa: SIM905
    "fractions datetime".split()
)
SAFE_BUILTINS = frozenset(
    "int float str bool list tuple dict set frozenset complex bytes len sum min max abs sorted reversed "  # noqa: SIM905
    "range enumerate zip map filter any all round pow divmod ord chr repr object".split()
)

named: set[type] = set()
"""In the program's process: its classes that the tests name, whose objects go by reference, whatever they
derive from."""

Reference = Callable[[Any], list[Any]]
Dereference = Callable[[str, Any], Any]
Encoder = Callable[[Any, Reference], Any]


class Malformed(Exception):
    """The data stand for no value."""


def encode(value: Any, reference: Reference) -> Any:
    """`value` as JSON data; what is not plain goes through `reference`.

    RecursionError: nested too deep, or a container that contains itself.
    """
    kind = type(value)
    if value is None or kind is bool or kind is float or kind is str:
        return value
    if kind is int:
        return value if -(1 << 62) < value < 1 << 62 else ["i", hex(value)]
    for base, encoder in _ENCODERS.items():
        if isinstance(value, base):
            if kind is base:
                return encoder(value, reference)
            if named and not named.isdisjoint(kind.__mro__):
                return reference(value)
            if base is tuple and (fields := _fields(kind)):
                return ["N", kind.__name__, fields, encoder(value, reference)[1]]
            return encoder(value, reference)
    if value is NotImplemented:
        return ["ni"]
    if isinstance(value, types.ModuleType):
        return ["m", str(value.__name__)]
    if (name := _safe_name(value)) is not None:
        return ["n", *name]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in "biufcU":
        return encode(value.item(), reference)
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        return ["a", value.dtype.str, list(value.shape), numpy.ascontiguousarray(value).tobytes().hex()]
    return reference(value)


def is_plain(value: Any) -> bool:
    """Whether a value goes over as it is, with no reference in it."""
    try:
        encode(value, _refuse)
    except (TypeError, RecursionError):
        return False
    return True


def _refuse(value: Any) -> list[Any]:
    raise TypeError


def _safe_name(value: Any) -> tuple[str, str] | None:
    if not isinstance(value, (type, types.BuiltinFunctionType, types.FunctionType)):
        return None
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    if not (name in SAFE_BUILTINS if module == "builtins" else module in SAFE_MODULES):
        return None
    return (module, name) if getattr(sys.modules.get(module), name, None) is value else None


def _fields(kind: type) -> list[str]:
    fields = getattr(kind, "_fields", None)
    return list(fields) if isinstance(fields, tuple) and all(type(name) is str for name in fields) else []


@functools.lru_cache(64)
def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def _items(kind: str, base: Any) -> Encoder:
    return lambda value, send: [kind, [encode(item, send) for item in base.__iter__(value)]]


def _pairs(kind: str) -> Encoder:
    return lambda value, send: [kind, [[encode(k, send), encode(v, send)] for k, v in dict.items(value)]]


_ENCODERS: dict[type, Encoder] = {
    bool: lambda value, _: bool(value),
    int: lambda value, _: ["i", hex(int.__index__(value))],
    float: lambda value, _: float.__add__(value, 0.0),
    complex: lambda value, _: ["c", value.real, value.imag],
    str: lambda value, _: str.__str__(value),
    list: _items("l", list),
    tuple: _items("t", tuple),
    collections.OrderedDict: _pairs("od"),
    collections.Counter: _pairs("C"),
    dict: _pairs("d"),
    set: _items("s", set),
    frozenset: _items("f", frozenset),
    collections.deque: _items("Q", collections.deque),
    bytes: lambda value, _: ["b", bytes.hex(value)],
    bytearray: lambda value, _: ["B", bytearray.hex(value)],
    range: lambda value, _: ["r", hex(value.start), hex(value.stop), hex(value.step)],
    slice: lambda value, send: ["S", *(encode(part, send) for part in (value.start, value.stop, value.step))],
    fractions.Fraction: lambda value, _: ["q", hex(value.numerator), hex(value.denominator)],
    decimal.Decimal: lambda value, _: ["D", decimal.Decimal.__str__(value)],
    datetime.datetime: lambda value, _: ["dt", datetime.datetime.isoformat(value)],
    datetime.date: lambda value, _: ["da", datetime.date.isoformat(value)],
    datetime.time: lambda value, _: ["ti", datetime.time.isoformat(value)],
    pathlib.PurePath: lambda value, _: ["p", pathlib.PurePath.__str__(value)],
    datetime.timedelta: lambda value, _: ["td", value.days, value.seconds, value.microseconds],
    type(Ellipsis): lambda value, _: ["e"],
}  # fmt: skip


def decode(data: Any, dereference: Dereference) -> Any:
    """The value that `data` stands for; raises `Malformed` where it stands for none."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    try:
        kind, *rest = data
        if kind in _CONTAINERS:
            return _CONTAINERS[kind]([decode(item, dereference) for item in rest[0]])
        if kind in _MAPPINGS:
            return _MAPPINGS[kind](
                {decode(key, dereference): decode(item, dereference) for key, item in rest[0]}
            )
        if kind in _SCALARS:
            return _SCALARS[kind](*rest)
        if kind == "N":
            return _namedtuple(rest[0], tuple(rest[1]))(*(decode(item, dereference) for item in rest[2]))
        if kind == "S":
            return slice(*(decode(part, dereference) for part in rest))
        if kind == "n" and (rest[0] in SAFE_MODULES or (rest[0] == "builtins" and rest[1] in SAFE_BUILTINS)):
            return getattr(importlib.import_module(rest[0]), rest[1])
        named = kind == "m" and rest[0]
        if named and (
            named in ("numpy", "sympy", "pandas") or named.split(".")[0] in sys.stdlib_module_names
        ):
            return importlib.import_module(named)
        if kind == "a":
            numpy = importlib.import_module("numpy")
            return numpy.frombuffer(bytes.fromhex(rest[2]), dtype=rest[0]).reshape(rest[1]).copy()
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError) as error:
        raise Malformed(f"{type(error).__name__} in a value") from None
    return dereference(kind, rest)


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "l": list, "t": tuple, "s": set, "f": frozenset, "Q": collections.deque,
}  # fmt: skip
_MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "d": dict, "od": collections.OrderedDict, "C": collections.Counter,
}  # fmt: skip
_SCALARS: dict[str, Callable[..., Any]] = {
    "i": lambda text: int(text, 16),
    "c": complex,
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "r": lambda start, stop, step: range(int(start, 16), int(stop, 16), int(step, 16)),
    "q": lambda top, bottom: fractions.Fraction(int(top, 16), int(bottom, 16)),
    "D": decimal.Decimal,
    "dt": datetime.datetime.fromisoformat,
    "da": datetime.date.fromisoformat,
    "ti": datetime.time.fromisoformat,
    "td": lambda days, seconds, micro: datetime.timedelta(days, seconds, micro),
    "p": pathlib.PurePath,
    "e": lambda: ...,
    "ni": lambda: NotImplemented,
}
