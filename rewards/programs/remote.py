"""Objects of one process used in another: stand-ins that ask the process where the object is.

Both ends of the judge's socket are a `Peer`. Plain data go by value (`values`), everything else as a number and
its class, of which the other end makes a mirror: a class of the same name with the same special methods, each
of which asks. So Python's own rules (`bool` by `__len__`, `in` by `__iter__`, `!=` by `__eq__`) hold there too.

Messages  ["op", number, method, args, kwargs]   do this with object `number`
          ["value", data, changes]               the answer; what it did to arguments in place
          ["raised", data]                       or the exception
          ["print", text]                        in between, unanswered
"""

import asyncio
import copy
import enum
import json
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from rewards import wire
from rewards.programs.values import Malformed, decode, encode

ENDED = "the program ended"
LONGEST_MESSAGE = 64 << 20

COMPARISONS = frozenset("__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__".split())  # noqa: SIM905
_SIGNS = "add sub mul matmul truediv floordiv mod divmod pow and or xor lshift rshift"
ARITHMETIC = frozenset(f"__{way}{name}__" for name in _SIGNS.split() for way in ("", "r", "i"))
_OTHERS = (
    "call iter next len getitem setitem delitem bool str repr format hash abs neg pos invert int float complex "
    "index round trunc floor ceil reversed enter exit"
)
PROTOCOL = COMPARISONS | ARITHMETIC | {f"__{name}__" for name in _OTHERS.split()}
SPECIAL: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "batch": lambda target, size: list(islice(target, size)),
    "member": lambda kind, member, name: getattr(kind[member], name),
}
_MUTABLE = (list, dict, set, bytearray, deque)
_ENUMS = {kind.__name__: kind for kind in (enum.IntFlag, enum.Flag, enum.StrEnum, enum.IntEnum, enum.Enum)}


class ProgramGone(Exception):
    """The program's process ended, or sent something that is no message."""


class Pipe:
    """Messages over a socket: a length, then JSON."""

    def __init__(self, fd: int) -> None:
        self._fd, self._read, self._write = fd, os.read, os.write

    def send(self, message: Any) -> None:
        data = wire.frame(message)
        while data:
            data = data[self._write(self._fd, data) :]

    def receive(self) -> Any:
        length = wire.length_of(self._exactly(wire.HEAD_BYTES))
        if length > LONGEST_MESSAGE:
            raise ProgramGone("the program sent too much")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError):
            raise ProgramGone("the program sent something that is no message") from None

    def _exactly(self, length: int) -> bytes:
        try:
            return wire.exactly(lambda most: self._read(self._fd, most), length)
        except (OSError, EOFError):
            raise ProgramGone(ENDED) from None


class Mirrored(type):
    """The class of mirrors; a mirror's own attributes and calls are those of the class it mirrors."""

    r1_at: tuple["Peer", int]

    def __new__(cls, name: str, bases: tuple[Any, ...], body: dict[str, Any]) -> Any:
        if "r1_own" not in body.get("__slots__", ()):  # a class statement; `Peer._mirror` does not come here
            peer = next(base.r1_at[0] for base in bases if isinstance(base, Mirrored))
            peer.unjudged = f"the tests derive the class {name} from one of the program"
            raise TypeError(peer.unjudged)
        return super().__new__(cls, name, bases, body)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        peer, number = cls.r1_at
        return peer.ask(number, "__call__", args, kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or name == "r1_at":
            raise AttributeError(name)
        peer, number = cls.r1_at
        return peer.ask(number, "getattr", (name,))

    def __setattr__(cls, name: str, value: Any) -> None:
        peer, number = cls.r1_at
        peer.ask(number, "setattr", (name, value))


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        peer, number = object.__getattribute__(self, "r1_own")
        return peer.ask(number, name, args, kwargs)

    return method


class Remote(metaclass=Mirrored):
    """An object of the other process, by its number there."""

    __slots__ = ("r1_own",)

    def __getattr__(self, name: str) -> Any:
        peer, number = object.__getattribute__(self, "r1_own")
        return peer.ask(number, "getattr", (name,))

    __setattr__ = _forward("setattr")
    __delattr__ = _forward("delattr")
    __copy__ = _forward("copy")

    def __deepcopy__(self, _: Any) -> Any:
        return _forward("deepcopy")(self)


def _iterate(self: Any) -> Iterator[Any]:
    peer, number = object.__getattribute__(self, "r1_own")
    iterator, size = peer.ask(number, "__iter__"), 1
    if not isinstance(iterator, Remote):
        raise TypeError("iter() returned no iterator")
    peer, number = object.__getattribute__(iterator, "r1_own")
    while True:
        items = peer.ask(number, "batch", (size,))
        if type(items) is not list:
            raise TypeError("iteration returned no items")
        yield from items
        if len(items) < size:
            return
        size = min(2 * size, peer.most_ahead)


_METHODS = {name: _forward(name) for name in PROTOCOL} | {"__iter__": _iterate}


class Peer:
    """One end of the socket: what it has given away, and its mirrors of what it was given."""

    most_ahead = 256
    """Items asked of an iterator at once."""
    unjudged = ""
    """Why there can be no verdict."""

    def __init__(self, fd: int) -> None:
        self.pipe = Pipe(fd)
        self.objects: list[Any] = []  # given away; kept alive, so that an id stays its own
        self._numbers: dict[int, int] = {}
        self._described: set[int] = set()
        self._mirrors: dict[int, Any] = {}
        self._remotes: dict[int, Remote] = {}

    def send(self, message: list[Any]) -> None:
        self.pipe.send(message)

    def receive(self) -> list[Any]:
        message = self.pipe.receive()
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
        theirs = {**dict(enumerate(args)), **(kwargs or {})}
        after = {at: self.decoded(new) for at, new in changes}
        for at, new in after.items():
            self.changed(theirs[at], new, data is None)
        return self.decoded(data) if returned is None else self.same(theirs[returned], after, returned)

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

    def same(self, arg: Any, after: dict[Any, Any], at: Any) -> Any:
        """The value of a call that returned its argument `at`."""
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
            before = {**dict(enumerate(given)), **dict(named)}
            mutable = {
                at: a for at, a in {**dict(enumerate(args)), **kwargs}.items() if isinstance(a, _MUTABLE)
            }
            now = {at: self.encoded(arg) for at, arg in mutable.items()}
            changes = [[at, after] for at, after in now.items() if after != before[at]]
            own = [at for at, arg in mutable.items() if arg is value]
            return ["value", ["arg", own[0]] if own else self.encoded(value), changes]
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
        if issubclass(kind, Remote):
            return ["j", object.__getattribute__(value, "r1_own")[1]]
        if issubclass(kind, BaseException):
            return self._error(value)
        if issubclass(kind, enum.Enum):
            back = getattr(kind, "r1_at", None)
            return (
                ["je", back[1], value.name]
                if back
                else ["E", self._class(kind), encode(value.value, self.reference)]
            )
        if issubclass(kind, type):
            back = value.__dict__.get("r1_at")
            return ["j", back[1]] if back else self._class(value)
        if kind is types.CoroutineType:
            return ["co", self.number(value)]
        return ["o", self.number(value), self._class(kind)]

    def _class(self, kind: type) -> list[Any]:
        """A class: its number, and the first time its name, special methods and bases."""
        if (back := kind.__dict__.get("r1_at")) is not None:
            return ["j", back[1]]
        module = kind.__module__
        if (
            issubclass(kind, BaseException)
            and getattr(sys.modules.get(str(module)), kind.__name__, None) is kind
        ):
            if str(module).partition(".")[0] in sys.stdlib_module_names:
                return ["x", module, kind.__name__]
        number = self.number(kind)
        if number in self._described:
            return ["T", number]
        self._described.add(number)
        if issubclass(kind, enum.Enum):
            base = next(name for name, base in _ENUMS.items() if issubclass(kind, base))
            members = [[name, self.encoded(member.value)] for name, member in kind.__members__.items()]
            return ["En", number, kind.__name__, base, members]
        special = [n for n in PROTOCOL if getattr(kind, n, None) is not getattr(object, n, None)]
        bases = [b for b in kind.__bases__ if b.__module__ == module or issubclass(b, BaseException)]
        return [
            "T",
            number,
            kind.__name__,
            special,
            [self._class(base) for base in bases if base is not object],
        ]

    def _error(self, error: BaseException) -> list[Any]:
        data = {name: value for name, value in vars(error).items() if not name.startswith("_")}
        try:
            text = str(error)[:500]
        except BaseException:
            text = ""
        parts = []
        for value in (list(error.args), data):
            try:
                parts.append(encode(value, self.reference))
            except Exception:
                parts.append(["l", []] if value is not data else ["d", []])
        return ["X", self._class(type(error)), text, *parts]

    def _dereference(self, kind: str, rest: list[Any]) -> Any:
        if kind == "j":
            return self.objects[rest[0]] if rest[0] >= 0 else self.objects[len(self.objects)]
        if kind == "je":
            return self.objects[rest[0]][rest[1]]
        if kind == "o":
            return self._remote(int(rest[0]), self.decoded(rest[1]))
        if kind == "co":
            return self._awaited(int(rest[0]))
        if kind in ("T", "En"):
            number, *description = rest
            if number not in self._mirrors:
                make = self._mirror if kind == "T" else self._mirror_enum
                self._mirrors[int(number)] = make(int(number), *description)
            return self._mirrors[number]
        if kind == "x":
            module = sys.modules.get(rest[0]) if not rest[0].startswith("unittest") else None
            found = getattr(module, rest[1], RuntimeError)
            return found if isinstance(found, type) and issubclass(found, BaseException) else RuntimeError
        if kind == "X":
            return _exception(
                self.decoded(rest[0]), str(rest[1]), self.decoded(rest[2]), self.decoded(rest[3])
            )
        if kind == "E":
            return self.decoded(rest[0])(self.decoded(rest[1]))
        raise Malformed("an unknown kind of value")

    def _remote(self, number: int, kind: Any) -> Remote:
        """One stand-in for one object, so that `is` holds."""
        if number not in self._remotes:
            made: Remote = object.__new__(kind)
            object.__setattr__(made, "r1_own", (self, number))
            self._remotes[number] = made
        return self._remotes[number]

    def _mirror(self, number: int, name: str, special: list[str], bases: list[Any]) -> type:
        parents = tuple(self.decoded(base) for base in bases)
        body: dict[str, Any] = {"r1_at": (self, number), "__module__": "mirrors"}
        if any(issubclass(parent, BaseException) for parent in parents):
            body["__str__"] = lambda error: error.r1_text
        else:
            body |= {n: _METHODS[n] for n in special if n in _METHODS} | {"__slots__": ()}
        return type.__new__(Mirrored, str(name), parents or (Remote,), body)

    def _mirror_enum(self, number: int, name: str, base: str, members: list[Any]) -> Any:
        def attribute(member: Any, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return self.ask(number, "member", (member.name, name))

        def fill(body: Any) -> None:
            body["__getattr__"] = attribute

        parent: Any = types.new_class(str(name), (_ENUMS[base],), {}, fill)
        made = enum.unique(parent(str(name), [(str(n), self.decoded(value)) for n, value in members]))
        type.__setattr__(made, "r1_at", (self, number))
        return made

    async def _awaited(self, number: int) -> Any:
        return self.ask(number, "await")


def _exception(kind: Any, text: str, args: list[Any], data: dict[str, Any]) -> BaseException:
    """An exception as an instance of its class here; its own `__init__` ran where it was made."""
    try:
        ours = isinstance(kind, Mirrored) or kind.__module__ != "builtins"
        error: BaseException = kind.__new__(kind, *args) if ours else kind(*args)
        error.args = tuple(args)
    except Exception:
        error = RuntimeError(text)
    if isinstance(type(error), Mirrored):
        error.__dict__["r1_text"] = text
    error.__dict__.update(data)
    error.__dict__["r1_theirs"] = True
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
    else:
        return False
    return True


class _Loop(asyncio.SelectorEventLoop):
    """An event loop without the pair of sockets that wakes one from other threads: no program gets a socket."""

    def _make_self_pipe(self) -> None:
        pass

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class _Loops(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _Loop


def quiet_loops() -> None:
    """Let `asyncio.run` work in this process, which may not open sockets."""
    asyncio.set_event_loop_policy(_Loops())


def words(error: BaseException) -> str:
    """An exception in one line; its own `__str__` may raise."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    except BaseException:
        return "an exception that cannot be printed"
