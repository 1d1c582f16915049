"""Assert-style tests in one process, the program in another, so that the program cannot give the verdict.

`judge` runs the tests. In their namespace the program's functions are `Remote` stand-ins: a call goes over a
pipe to `serve` in the program's process, and its answer comes back as data (`values`). So expected
values, the tests' source and the verdict exist only outside the program's process: it cannot read them from
frames, the heap or files, cannot patch what compares them, and leaving early leaves the tests unpassed.

What a test asks of the program's own objects, the program answers: `==` between two of its objects, a helper
function of its own that the test calls. It answers nothing else: a stand-in never equals plain data and never
turns into a number, and built-in and library names in a test mean the real ones even where the program
redefined them (unless the test uses no other name of the program, as for a program about its own `sum`).

Known differences from running in one process: a module-level variable is copied when the tests begin; an
argument changed in place is seen by the test when the call returns.
"""

import builtins
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from rewards import wire
from rewards.programs.values import Malformed, decode, encode

ENDED = "the program ended"
LONGEST_MESSAGE = 64 << 20


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


class _Changed:
    """The value of a call that changed some of its arguments in place."""

    def __init__(self, value: Any, changes: list[tuple[int, Any]]) -> None:
        self.value, self.changes = value, changes


class Link:
    """The judge's end of the socket."""

    def __init__(self, fd: int) -> None:
        self.pipe = Pipe(fd)
        self._own: list[Any] = []  # objects of the tests that the program may call
        self.gone = ""

    def ask(self, operation: str, *args: Any) -> Any:
        """Run an operation in the program; return its value, or raise its exception here."""
        if self.gone:
            raise ProgramGone(self.gone)
        try:
            self.pipe.send([operation, *args])
            while True:
                kind, *rest = self.pipe.receive()
                if kind == "value":
                    return self.decoded(rest[0])
                if kind == "changed":
                    return _Changed(
                        self.decoded(rest[0]), [(int(at), self.decoded(new)) for at, new in rest[1]]
                    )
                if kind == "raised":
                    raise _exception(str(rest[0]), str(rest[1]), rest[2])
                if kind != "own":
                    raise ProgramGone("the program sent something that is no message")
                self.pipe.send(self._called(*rest))
        except (Malformed, ValueError, TypeError, OSError, ProgramGone) as error:
            if getattr(error, "from_program", False):
                raise
            self.gone = str(error) if isinstance(error, (ProgramGone, Malformed)) else ENDED
            raise ProgramGone(self.gone) from None

    def encoded(self, value: Any) -> Any:
        return encode(value, self._reference)

    def decoded(self, data: Any) -> Any:
        return decode(data, self._dereference)

    def _reference(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["o", object.__getattribute__(value, "_id")]
        self._own.append(value)
        return ["j", len(self._own) - 1]

    def _dereference(self, kind: str, rest: list[Any]) -> Any:
        if kind == "o" and isinstance(rest[0], int):
            return Remote(self, rest[0])
        if kind == "j" and isinstance(rest[0], int) and 0 <= rest[0] < len(self._own):
            return self._own[rest[0]]
        raise Malformed("an unknown kind of value")

    def _called(self, number: Any, name: Any, args: Any, kwargs: Any) -> list[Any]:
        """The program calls a function that the test gave it, or reads a public attribute of an object."""
        try:
            own = self._own[int(number)]
            if name:
                if str(name).startswith("_") or isinstance(own, (types.FunctionType, types.ModuleType, type)):
                    raise AttributeError(name)
                return ["value", self.encoded(getattr(own, str(name)))]
            given = [self.decoded(item) for item in args]
            return ["value", self.encoded(own(*given, **{str(k): self.decoded(v) for k, v in kwargs}))]
        except ProgramGone:
            raise
        except Exception as error:
            return ["raised", type(error).__name__, str(error)[:500], []]


def _exception(name: str, text: str, bases: Any) -> BaseException:
    """An exception like the program's: of the same built-in class, or of its nearest one."""
    for candidate in [name, *map(str, bases)]:
        kind = getattr(builtins, candidate, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            made = type(name, (kind,), {}) if candidate != name else kind
            try:
                error = made(text)
            except Exception:
                continue
            error.from_program = True
            return error
    error = RuntimeError(f"{name}: {text}")
    error.from_program = True  # type: ignore[attr-defined]
    return error


def _ask(remote: "Remote", operation: str, *args: Any) -> Any:
    link = object.__getattribute__(remote, "_link")
    return link.ask(operation, object.__getattribute__(remote, "_id"), *(link.encoded(arg) for arg in args))


def _plain(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the program gave a {type(value).__name__} for a {kind.__name__}")
    return value


def _operation(name: str, kind: type | None = None) -> Callable[..., Any]:
    """A method that asks the program, for a plain `kind` where one is named."""

    def method(self: "Remote", *args: Any) -> Any:
        value = _ask(self, name, *args)
        return value if kind is None else _plain(value, kind)

    return method


class Remote:
    """An object of the program, by reference."""

    __slots__ = ("_id", "_link")

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_id", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        link = object.__getattribute__(self, "_link")
        given = [link.encoded(arg) for arg in args]
        named = [[key, link.encoded(arg)] for key, arg in kwargs.items()]
        answer = link.ask("call", object.__getattribute__(self, "_id"), given, named)
        if not isinstance(answer, _Changed):
            return answer
        for at, new in answer.changes:
            _change(args[at], new)
        return answer.value

    __getattr__ = _operation("getattr")
    __setattr__ = _operation("setattr")
    __delattr__ = _operation("delattr")
    __getitem__ = _operation("getitem")
    __setitem__ = _operation("setitem")
    __delitem__ = _operation("delitem")
    __enter__ = _operation("enter")
    __len__ = _operation("len", int)
    __bool__ = _operation("bool", bool)
    __str__ = _operation("str", str)
    __repr__ = _operation("repr", str)
    __hash__ = _operation("hash", int)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(_plain(_ask(self, "eq", other), bool))

    def __iter__(self) -> Iterator[Any]:
        iterator, size = _ask(self, "iter"), 1
        while True:
            items = _plain(_ask(iterator, "next", size), list)
            yield from items
            if len(items) < size:
                return
            size = min(2 * size, 256)

    def __next__(self) -> Any:
        items = _plain(_ask(self, "next", 1), list)
        if not items:
            raise StopIteration
        return items[0]

    def __contains__(self, item: Any) -> bool:
        return item in list(self)  # all of it first: an endless one must not find everything

    def __exit__(self, *_: object) -> None:
        _ask(self, "exit")

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and bool(_ask(self, "isinstance", instance))


def _arithmetic(name: str) -> Callable[[Any, Any], Any]:
    def operator(self: "Remote", other: Any) -> Any:
        value = _ask(self, "operator", name, other)
        # A result of the program's own type; a plain one could be forged to match the test.
        both = isinstance(other, Remote)
        return value if isinstance(value, Remote) or (both and type(value) is bool) else NotImplemented

    return operator


_PLAIN = "add sub mul matmul truediv floordiv mod pow and or xor lt le gt ge"
for _name in f"{_PLAIN} radd rsub rmul rmatmul rtruediv".split():
    setattr(Remote, f"__{_name}__", _arithmetic(f"__{_name}__"))


def _change(old: Any, new: Any) -> None:
    """Give `old` the contents that the program gave its copy."""
    if isinstance(old, (list, bytearray)) and isinstance(new, type(old)):
        old[:] = new
    elif isinstance(old, (dict, set)) and isinstance(new, (dict, set)):
        old.clear()
        old.update(new)


def judge(fd: int, tests: list[str], stop_early: bool) -> str:
    """Run the tests against the program at the end of `fd`: "PASSED DETAIL" or "E DETAIL"."""
    compiled = []
    for number, test in enumerate(tests, 1):
        try:
            compiled.append(compile(test, f"test {number}", "exec"))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"E test {number} does not compile: {error}"
    link = Link(fd)
    passed, detail = 0, ""
    try:
        kind, *rest = link.pipe.receive()
        if kind != "ready":
            return f"0 the program raised {rest[0]}"
        namespace = _namespace(link, [str(name) for name in rest[0]], tests)
    except (ProgramGone, Malformed, ValueError, TypeError) as error:
        return f"0 {error} before the tests"
    for number, statement in enumerate(compiled, 1):
        try:
            exec(statement, namespace)
            passed += 1
        except BaseException as error:
            detail = detail or f"test {number} of {len(tests)}: {words(error)}"
            if stop_early or link.gone:
                break
    return f"{passed} {detail}"


def _namespace(link: Link, offered: list[str], tests: list[str]) -> dict[str, Any]:
    """The tests' module, with those of the program's names that the tests mention."""
    mentioned = set(re.findall(r"\w+", "\n".join(tests)))
    names = [name for name in offered if name in mentioned]
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    values = {name: link.ask("global", name) for name in names}
    standard = {name for name in names if hasattr(builtins, name) or name in sys.stdlib_module_names}
    about_others = any(isinstance(values[name], Remote) for name in names if name not in standard)
    for name, value in values.items():
        if name not in standard or not about_others or isinstance(value, types.ModuleType):
            module.__dict__[name] = value
    return module.__dict__


def words(error: BaseException) -> str:
    """An exception in one line; its own `__str__` may raise."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    except BaseException:
        return "an exception that cannot be printed"
