"""Objects of one process used in another: stand-ins that ask the process where the object is.

Both ends of the judge's socket are a `Peer`. Plain data go by value (`values`), everything else as a number
and its class, of which the other end makes a mirror: a class of that name with the same special methods, each
of which asks. So Python's own rules (`bool` by `__len__`, `in` by `__iter__`, `!=` by `__eq__`) hold there.

Messages  ["op", number, method, args, kwargs]   do this with object `number`
          ["value", data, changes]               the answer; what it did to arguments in place
          ["raised", data]                       or the exception
          ["print", text]                        in between, unanswered
"""

import copy
import operator
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any

from rewards.programs.judging.values import Malformed, decode, encode
from rewards.wire import Channel, text_of

LONGEST_MESSAGE = 64 << 20

COMPARISONS = frozenset("__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__".split())  # noqa: SIM905
_SIGNS = "add sub mul matmul truediv floordiv mod divmod pow and or xor lshift rshift"
ARITHMETIC = frozenset(f"__{way}{name}__" for name in _SIGNS.split() for way in ("", "r", "i"))
_OTHERS = (
    "call iter next len getitem setitem delitem bool str repr format hash abs neg pos invert int float index "
    "complex round trunc floor ceil reversed enter exit"
)
PROTOCOL = COMPARISONS | ARITHMETIC | {f"__{name}__" for name in _OTHERS.split()}
SPECIAL: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "item": operator.getitem,
    "iter": iter,
    "size": len,
    "batch": lambda target, size: list(islice(target, size)),
}
_MUTABLE = (list, dict, set, bytearray, deque)


class ProgramGone(Exception):
    """The program's process ended, or sent something that is no message."""


def at(stand_in: Any) -> tuple["Peer", int]:
    """Where the object or class of a stand-in is: the end of the socket that asks for it, and its number."""
    if isinstance(stand_in, type):
        return type.__getattribute__(stand_in, "r1_class")
    return object.__getattribute__(stand_in, "r1_own")


def _forward(method: str) -> Callable[..., Any]:
    def ask(stand_in: Any, /, *args: Any, **kwargs: Any) -> Any:
        peer, number = at(stand_in)
        return peer.ask(number, method, args, kwargs)

    return ask


def iterate(stand_in: Any) -> Iterator[Any]:
    """The items of an object of the other process, asked for in growing numbers."""
    iterator, size = _forward("iter")(stand_in), 1
    while True:
        items = _forward("batch")(iterator, size)
        if type(items) is not list:
            raise TypeError("iteration returned no items")
        yield from items
        if len(items) < size:
            return
        size = min(2 * size, at(iterator)[0].most_ahead)


_METHODS = {name: _forward(name) for name in PROTOCOL} | {"__iter__": iterate}


class Mirrored(type):
    """The class of mirrors; what is asked of a mirror is asked of the class that it mirrors."""

    r1_class: tuple["Peer", int]

    def __new__(cls, name: str, bases: tuple[Any, ...], body: dict[str, Any]) -> Any:
        if bases:  # a class statement of a test; `Peer._mirror` does not come here
            peer = next(base.r1_class[0] for base in bases if isinstance(base, Mirrored))
            peer.unjudged = f"the tests derive the class {name} from one of the program"
            raise TypeError(peer.unjudged)
        return super().__new__(cls, name, bases, body)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or name == "r1_class":
            raise AttributeError(name)
        return _forward("getattr")(cls, name)

    __call__ = _forward("__call__")
    __setattr__ = _forward("setattr")
    __iter__ = iterate
    __len__ = _forward("size")
    __getitem__ = _forward("item")


class Remote(metaclass=Mirrored):
    """An object of the other process, by its number there."""

    __slots__ = ("r1_own",)
    __getattr__ = _forward("getattr")
    __setattr__ = _forward("setattr")
    __delattr__ = _forward("delattr")
    __copy__ = _forward("copy")

    def __deepcopy__(self, _: Any) -> Any:
        return _forward("deepcopy")(self)


class Peer:
    """One end of the socket: what it has given away, and its mirrors of what it was given."""

    most_ahead = 256
    """Items asked of an iterator at once."""
    unjudged = ""
    """Why there can be no verdict."""

    def __init__(self, fd: int) -> None:
        self.pipe = Channel(fd, longest=LONGEST_MESSAGE)
        os.set_blocking(fd, True)  # no deadlines here, and polling takes as long as a message
        self.objects: list[Any] = []  # given away; kept alive, so that an id stays its own
        self._numbers: dict[int, int] = {}
        self._described: set[int] = set()
        self._mirrors: dict[int, Any] = {}
        self._remotes: dict[int, Remote] = {}

    def send(self, message: list[Any]) -> None:
        try:
            self.pipe.send(message)
        except (EOFError, OSError):
            raise ProgramGone("the program ended") from None

    def receive(self) -> list[Any]:
        try:
            message = self.pipe.receive()
        except (EOFError, OSError):
            raise ProgramGone("the program ended") from None
        except OverflowError:
            raise ProgramGone("the program sent too much") from None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, list) or not message:
            raise ProgramGone("the program sent something that is no message")
        return message

    # ---- asking and answering

    def ask(self, number: int, name: str, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Do `name` with the other end's object; its value, or its exception raised here."""
        given = [self.encoded(arg) for arg in args]
        self.send(["op", number, name, given, [[k, self.encoded(v)] for k, v in (kwargs or {}).items()]])
        kind, rest = self.until_answered()
        if kind == "raised":
            error = self.decoded(rest[0])
            # As from a generator's frame: an end of iteration must not end a loop of the caller.
            ends = isinstance(error, (StopIteration, StopAsyncIteration, GeneratorExit))
            if not isinstance(error, (Exception, SystemExit)) or (ends and name != "__next__"):
                error = RuntimeError(f"{type(error).__name__}: {error}")
            raise error
        data, changes = rest
        returned = data[1] if isinstance(data, list) and data[:1] == ["arg"] else None
        passed = {**dict(enumerate(args)), **(kwargs or {})} if changes or returned is not None else {}
        after = {key: self.decoded(new) for key, new in changes}
        for key, new in after.items():
            self.changed(passed[key], new, data is None)
        return self.decoded(data) if returned is None else self.same(passed[returned], after.get(returned))

    def until_answered(self) -> tuple[str, list[Any]]:
        """Do what the other end asks until it answers."""
        while True:
            kind, *rest = self.receive()
            if kind != "op":
                return kind, rest
            self.send(self._answer(*rest))

    def changed(self, old: Any, new: Any, at_once: bool) -> None:
        """An argument was changed in place; `at_once`: by a call that returned nothing."""
        change(old, new)

    def same(self, arg: Any, new: Any) -> Any:
        """The value of a call that returned its argument; `new`: changed in place to this, or `None`."""
        return arg

    def perform(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Do `name` with an object of this end."""
        if name in SPECIAL:
            return SPECIAL[name](target, *args)
        return getattr(type(target), name)(target, *args, **kwargs)

    def _answer(self, number: Any, name: Any, given: list[Any], named: list[Any]) -> list[Any]:
        try:
            args = [self.decoded(item) for item in given]
            kwargs = {str(key): self.decoded(item) for key, item in named}
            value = self.perform(self.objects[number], name, args, kwargs)
            passed: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            before: dict[Any, Any] = {**dict(enumerate(given)), **dict(named)}
            mutable = {key: arg for key, arg in passed.items() if isinstance(arg, _MUTABLE) or _is_array(arg)}
            after = {key: self.encoded(arg) for key, arg in mutable.items()}
            own = [["arg", key] for key, arg in mutable.items() if arg is value]
            changes = [[key, now] for key, now in after.items() if now != before[key]]
            return ["value", own[0] if own else self.encoded(value), changes]
        except ProgramGone:
            raise
        except BaseException as error:
            return ["raised", self.encoded(error)]

    # ---- references

    def encoded(self, value: Any) -> Any:
        """`value` as data; containers that contain themselves stay here, by reference."""
        try:
            return encode(value, self.reference)
        except RecursionError:
            return self.reference(value)

    def decoded(self, data: Any) -> Any:
        return decode(data, self._dereference)

    def number(self, value: Any) -> int:
        """The number that an object of this end is given away by."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._numbers[id(value)]

    def reference(self, value: Any) -> list[Any]:
        kind = type(value)
        if issubclass(kind, (Remote, Mirrored)):
            return ["j", at(value)[1]]
        if issubclass(kind, BaseException):
            return self._error(value)
        if issubclass(kind, type):
            return self._class(value)
        return ["co" if kind is types.CoroutineType else "o", self.number(value), self._class(kind)]

    def _class(self, kind: type) -> list[Any]:
        """A class: its number, and the first time its name, special methods and bases."""
        module = str(kind.__module__)
        if isinstance(kind, Mirrored):
            return ["j", at(kind)[1]]
        library = sys.modules.get(module) if module.partition(".")[0] in sys.stdlib_module_names else None
        if issubclass(kind, BaseException) and getattr(library, kind.__name__, None) is kind:
            return ["x", module, kind.__name__]
        number = self.number(kind)
        if number in self._described:
            return ["T", number]
        self._described.add(number)
        special = [n for n in PROTOCOL if getattr(kind, n, None) is not getattr(object, n, None)]
        bases = [b for b in kind.__bases__ if b is not object]
        bases = [b for b in bases if b.__module__ == module or issubclass(b, BaseException)]
        return ["T", number, kind.__name__, special, [self._class(base) for base in bases]]

    def _error(self, error: BaseException) -> list[Any]:
        """An exception by value: its class, text, arguments, and public attributes."""
        data = {name: value for name, value in vars(error).items() if not name.startswith("_")}
        kind = self._class(type(error))  # before what may name it again
        return ["X", kind, text_of(error), self.encoded([*error.args]), self.encoded(data)]

    def _dereference(self, kind: str, rest: list[Any]) -> Any:
        number = rest[0]
        if kind == "j" and number >= 0:
            return self.objects[number]
        if kind == "co":
            return self._awaited(number)
        if kind == "o":
            if number not in self._remotes:  # one stand-in for one object, so that `is` holds
                mirror = self.decoded(rest[1])
                if not isinstance(mirror, Mirrored):
                    raise Malformed("an object of no class of the other end")
                made: Any = object.__new__(mirror)  # type: ignore[arg-type]
                object.__setattr__(made, "r1_own", (self, int(number)))
                self._remotes[number] = made
            return self._remotes[number]
        if kind == "T":
            if number not in self._mirrors:
                self._mirrors[number] = self._mirror(int(number), *rest[1:])
            return self._mirrors[number]
        if kind == "x":  # not unittest's, which skip a test
            library = number.partition(".")[0] in sys.stdlib_module_names - {"unittest"}
            found = getattr(sys.modules.get(number) if library else None, rest[1], RuntimeError)
            return found if isinstance(found, type) and issubclass(found, BaseException) else RuntimeError
        if kind == "X":
            return _exception(*map(self.decoded, rest))
        raise Malformed("an unknown kind of value")

    def _mirror(self, number: int, name: str, special: list[str], bases: list[Any]) -> type:
        parents = tuple(self.decoded(base) for base in bases)
        body: dict[str, Any] = {"r1_class": (self, number), "__module__": "mirrors"}
        if not all(isinstance(parent, Mirrored) or issubclass(parent, BaseException) for parent in parents):
            raise Malformed("a class derived from one of this end")
        if any(issubclass(parent, BaseException) for parent in parents):
            body["__str__"] = lambda error: error.r1_text
        else:
            body |= {n: _METHODS[n] for n in special if n in _METHODS} | {"__slots__": ()}
        return type.__new__(Mirrored, str(name), parents or (Remote,), body)

    async def _awaited(self, number: int) -> Any:
        return self.ask(number, "await")


def _exception(kind: Any, text: Any, args: list[Any], data: dict[str, Any]) -> BaseException:
    """An exception as an instance of its class here; its own `__init__` ran where it was made."""
    try:
        error: BaseException = kind(*args) if kind.__module__ == "builtins" else kind.__new__(kind, *args)
        error.args = tuple(args)
    except Exception:
        error = RuntimeError(text)
    error.__dict__.update(data, r1_text=text, r1_theirs=True)
    return error


def change(old: Any, new: Any) -> bool:
    """Give `old` the contents that its copy was given; `False` where it cannot change in place."""
    if isinstance(old, list) and isinstance(new, list):
        for at, (a, b) in enumerate(zip(old, new)):  # noqa: B905 - lengths may differ
            if not change(a, b):
                old[at] = b
        old[len(new) :] = new[len(old) :]
    elif isinstance(old, bytearray) and isinstance(new, bytearray):
        old[:] = new
    elif isinstance(old, (dict, set, deque)) and isinstance(new, (dict, set, deque)):
        old.clear()
        old.extend(new) if isinstance(old, deque) else old.update(new)
    elif _is_array(old) and _is_array(new) and old.shape == new.shape:
        old[...] = new
    else:
        return False
    return True


def _is_array(value: Any) -> bool:
    return type(value).__name__ == "ndarray" and type(value).__module__ == "numpy"


def quiet_loops(source: str) -> None:
    """Let `asyncio.run` do without the sockets that wake a loop from other threads; no program may have any.

    Only where `source` could use it: the import takes longer than most programs run."""
    if "async" not in source:
        return
    asyncio: Any = import_module("asyncio")
    quiet = dict.fromkeys(("_make_self_pipe", "_close_self_pipe", "_write_to_self"), lambda loop: None)
    loop = type("Loop", (asyncio.SelectorEventLoop,), quiet)
    asyncio.set_event_loop_policy(
        type("Policy", (asyncio.DefaultEventLoopPolicy,), {"_loop_factory": loop})()
    )
