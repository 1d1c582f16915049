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
import itertools
import pathlib
import sys
import types
from collections.abc import Callable, Iterable
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

CONTAINERS = frozenset(("l", "t", "s", "f", "Q", "d", "od", "C"))
"""Kinds whose parts are values of their own, keys of a mapping before what they stand for."""

Reference = Callable[[Any], list[Any]]
Dereference = Callable[[str, Any], Any]


class Malformed(Exception):
    """The data stand for no value."""


def encode(value: Any, reference: Reference) -> Any:
    """`value` as JSON data, `[kind, *parts]`; what is not plain goes through `reference`.

    RecursionError: nested too deep, or a container that contains itself."""
    kind = type(value)
    if value is None or kind is bool or kind is float or kind is str:
        return value
    if kind is int and -(1 << 62) < value < 1 << 62:
        return value
    found = _split(value, kind)
    return [found[0], *(encode(part, reference) for part in found[1])] if found else reference(value)


def _split(value: Any, kind: type) -> tuple[str, Iterable[Any]] | None:
    """Its kind on the wire and its parts, by the table of the nearest class that is there."""
    for base in (*kind.__mro__, *value.__class__.__mro__):  # one that lies about its class is a TypeError
        if base in _PARTS:
            if kind is not base and not named.isdisjoint(kind.__mro__):
                return None
            fields = getattr(kind, "_fields", None) if base is tuple else None
            if fields and isinstance(fields, tuple) and all(type(name) is str for name in fields):
                return "N", (kind.__name__, " ".join(fields), *tuple.__iter__(value))
            short, parts = _PARTS[base]
            return short, parts(value)
    if isinstance(value, types.ModuleType):
        return "m", (str(value.__name__),)
    if isinstance(value, (type, types.BuiltinFunctionType, types.FunctionType)):
        name = str(getattr(value, "__module__", "")), str(getattr(value, "__name__", ""))
        is_it = _is_safe(*name) and getattr(sys.modules.get(name[0]), name[1], None) is value
        return ("n", name) if is_it else None
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in "biufcU":
        return "v", (value.item(),)
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        return "a", (value.dtype.str, list(value.shape), numpy.ascontiguousarray(value).tobytes().hex())
    return None


def is_plain(value: Any) -> bool:
    """Whether a value goes over as it is, with no reference in it."""
    try:
        encode(value, _refuse)
    except (TypeError, RecursionError):
        return False
    return True


def _refuse(value: Any) -> list[Any]:
    raise TypeError


def decode(data: Any, dereference: Dereference) -> Any:
    """The value that `data` stands for; raises `Malformed` where it stands for none."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    try:
        kind, *parts = data
        if kind in _MAKERS:
            return _MAKERS[kind](*[decode(part, dereference) for part in parts])
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError) as error:
        raise Malformed(f"{type(error).__name__} in a value") from None
    return dereference(kind, parts)


def _is_safe(module: str, name: str) -> bool:
    return name in SAFE_BUILTINS if module == "builtins" else module in SAFE_MODULES


def _safe(module: str, name: str) -> Any:
    if not _is_safe(module, name):
        raise LookupError(name)
    return getattr(importlib.import_module(module), name)


def _module(name: str) -> Any:
    if name not in ("numpy", "sympy", "pandas") and name.split(".")[0] not in sys.stdlib_module_names:
        raise LookupError(name)
    return importlib.import_module(name)


def _array(kind: str, shape: list[int], data: str) -> Any:
    numpy = importlib.import_module("numpy")
    found = numpy.frombuffer(bytes.fromhex(data), dtype=kind).reshape(shape).copy()
    return found if found.size else found.view(_nothing())


@functools.cache
def _nothing() -> Any:
    """The type of arrays without items: broadcast against others, one would be equal to anything."""
    numpy = importlib.import_module("numpy")

    class Nothing(numpy.ndarray):  # type: ignore[name-defined]
        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **named: Any) -> Any:
            if any(numpy.size(given) for given in inputs):
                raise TypeError("an array without items, and one that has some")
            return getattr(ufunc, method)(*map(numpy.array, inputs), **named)

    return Nothing


@functools.lru_cache(64)
def _namedtuple(name: str, fields: str) -> Any:
    return collections.namedtuple(name, fields)


def _flat(mapping: dict[Any, Any]) -> Iterable[Any]:
    return itertools.chain.from_iterable(dict.items(mapping))


def _gathered(kind: Any) -> Callable[..., Any]:
    return lambda *items: kind(items)


def _mapped(kind: Any) -> Callable[..., Any]:
    return lambda *flat: kind(dict(zip(flat[::2], flat[1::2], strict=True)))


_BY_VALUE: dict[str, tuple[type, Callable[[Any], Iterable[Any]], Callable[..., Any]]] = {
    "i": (int, lambda v: [hex(int.__index__(v))], lambda text: int(text, 16)),
    "v": (float, lambda v: [float.__pos__(v)], lambda value: value),
    "u": (str, lambda v: [str.__str__(v)], str),
    "c": (complex, lambda v: [v.real, v.imag], complex),
    "l": (list, list.__iter__, _gathered(list)),
    "t": (tuple, tuple.__iter__, _gathered(tuple)),
    "s": (set, set.__iter__, _gathered(set)),
    "f": (frozenset, frozenset.__iter__, _gathered(frozenset)),
    "Q": (collections.deque, collections.deque.__iter__, _gathered(collections.deque)),
    "d": (dict, _flat, _mapped(dict)),
    "od": (collections.OrderedDict, _flat, _mapped(collections.OrderedDict)),
    "C": (collections.Counter, _flat, _mapped(collections.Counter)),
    "b": (bytes, lambda v: [bytes.hex(v)], bytes.fromhex),
    "B": (bytearray, lambda v: [bytearray.hex(v)], bytearray.fromhex),
    "r": (range, lambda v: [v.start, v.stop, v.step], range),
    "S": (slice, lambda v: [v.start, v.stop, v.step], slice),
    "q": (fractions.Fraction, lambda v: [v.numerator, v.denominator], fractions.Fraction),
    "D": (decimal.Decimal, lambda v: [decimal.Decimal.__str__(v)], decimal.Decimal),
    "dt": (datetime.datetime, lambda v: [datetime.datetime.isoformat(v)], datetime.datetime.fromisoformat),
    "da": (datetime.date, lambda v: [datetime.date.isoformat(v)], datetime.date.fromisoformat),
    "ti": (datetime.time, lambda v: [datetime.time.isoformat(v)], datetime.time.fromisoformat),
    "td": (datetime.timedelta, lambda v: [v.days, v.seconds, v.microseconds], datetime.timedelta),
    "p": (pathlib.PurePath, lambda v: [pathlib.PurePath.__str__(v)], pathlib.PurePath),
    "e": (type(...), lambda v: [], lambda: ...),
    "ni": (type(NotImplemented), lambda v: [], lambda: NotImplemented),
}
_PARTS = {base: (kind, parts) for kind, (base, parts, _) in _BY_VALUE.items()}
_MAKERS: dict[str, Callable[..., Any]] = {kind: maker for kind, (_, _, maker) in _BY_VALUE.items()} | {
    "N": lambda name, fields, *items: _namedtuple(name, fields)(*items),
    "n": _safe,
    "m": _module,
    "a": _array,
}
