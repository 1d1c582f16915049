"""The program's end of the judge's socket: run the program, then the judge's operations on its objects.

All of this runs in the program's own process, so none of it is trusted: a program that takes it over can send
nothing that a program that answers could not.
"""

import io
import sys
import types
from typing import Any

from rewards.programs.judging import values
from rewards.programs.judging.pytests import Captured
from rewards.programs.judging.remote import Peer, quiet_loops
from rewards.wire import words

MOST_PRINTED = 1 << 20
"""Characters between two messages; more are dropped."""


class _Program(Peer):
    most_ahead = 1  # an iterator of the tests is advanced no further than the program asked

    def __init__(self, fd: int, namespace: dict[str, Any]) -> None:
        super().__init__(fd)
        self.printed = _Printed()
        self.number(namespace)

    def send(self, message: list[Any]) -> None:
        if text := self.printed.taken():
            super().send(["print", text])
        super().send(message)

    def perform(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name == "global":
            value = target[args[0]]
            if isinstance(value, type) and args[0][:1].isupper():
                values.named.add(value)
            # Of the program's, called in the program; a library's under its own name is the tests' own.
            functions = (types.FunctionType, types.BuiltinFunctionType)
            if isinstance(value, functions) and value.__name__ != args[0] and value.__module__ != "solution":
                return lambda *given, **named: value(*given, **named)
            return value
        if name == "await":
            return sys.modules["asyncio"].run(target)
        return super().perform(target, name, args, kwargs)


class _Printed(Captured):
    """The program's stdout, which reaches the tests' own before the next message."""

    def write(self, text: str) -> int:
        return super().write(text) if self.tell() < MOST_PRINTED else len(text)

    def close(self) -> None:
        """A program may close it."""


class _Stdin(io.TextIOBase):
    """Lines that the tests give: the judge's object 0 reads one."""

    def __init__(self, program: _Program) -> None:
        self._program = program

    def readline(self, size: Any = -1, /) -> str:  # type: ignore[override]
        return str(self._program.ask(0, "__call__"))

    def read(self, size: int | None = -1, /) -> str:
        return "".join(self)


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return "class"
    return "module" if isinstance(value, types.ModuleType) else "call" if callable(value) else "data"


def module(name: str) -> dict[str, Any]:
    """The namespace of a fresh module that is registered as dataclasses and pickle expect."""
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made.__dict__


def serve(fd: int, code: str) -> None:
    """Run the program, then answer until the judge closes the socket.

    The program is not `__main__` here, so its own demonstration under that guard stays out."""
    quiet_loops(code)
    namespace = module("solution")
    program = _Program(fd, namespace)
    sys.stdout, sys.stdin = program.printed, _Stdin(program)
    try:
        exec(compile(code, "program", "exec"), namespace)
    except BaseException as error:
        program.pipe.send(["raised", words(error)])
        return
    program.printed.taken()
    offered = [
        [name, _kind(value)]
        for name, value in list(namespace.items())[:10_000]
        if isinstance(name, str) and not name.startswith("__")
    ]
    program.pipe.send(["ready", offered])
    program.until_answered()
