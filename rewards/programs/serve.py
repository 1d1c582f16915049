"""The program's end of the judge's socket: run the program, then the judge's operations on its objects.

All of this runs in the program's own process, so none of it is trusted: a program that takes it over can send
nothing that a program that answers could not.
"""

import sys
import types
from collections.abc import Callable
from itertools import islice
from typing import Any

from rewards.programs.judge import Pipe, words
from rewards.programs.values import decode, encode

_MUTABLE = (list, dict, set, bytearray)


class _Served:
    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def reference(self, value: Any) -> list[Any]:
        if isinstance(value, _Own):
            return ["j", value._number]
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)  # kept alive, so that its id stays its own
        return ["o", self.numbers[id(value)]]

    def encoded(self, value: Any) -> Any:
        try:
            return encode(value, self.reference)
        except RecursionError:
            return self.reference(value)

    def decoded(self, data: Any) -> Any:
        return decode(data, lambda kind, rest: self.objects[rest[0]] if kind == "o" else _Own(self, rest[0]))

    def until_answered(self) -> Any:
        """Run requests until the answer to our own arrives; return its value or raise its exception."""
        while True:
            operation, *rest = self.pipe.receive()
            if operation == "value":
                return self.decoded(rest[0])
            if operation == "raised":
                kind = getattr(__import__("builtins"), rest[0], RuntimeError)
                known = isinstance(kind, type) and issubclass(kind, Exception)
                raise kind(rest[1]) if known else RuntimeError
            try:
                answer = self.done(operation, rest)
            except BaseException as error:
                bases = [base.__name__ for base in type(error).__mro__]
                answer = ["raised", type(error).__name__, _text(error), bases]
            self.pipe.send(answer)

    def done(self, operation: str, rest: list[Any]) -> list[Any]:
        if operation == "global":
            return ["value", self.encoded(sys.modules["solution"].__dict__[rest[0]])]
        target = self.objects[rest[0]]
        if operation == "call":
            return self.called(target, rest[1], dict(rest[2]))
        args = [self.decoded(item) for item in rest[1:]]
        return ["value", self.encoded(_OPERATIONS[operation](target, *args))]

    def called(self, target: Any, given: list[Any], named: dict[str, Any]) -> list[Any]:
        args = [self.decoded(item) for item in given]
        value = target(*args, **{key: self.decoded(item) for key, item in named.items()})
        answer = self.encoded(value)
        changed = []
        for at, (arg, before) in enumerate(zip(args, given, strict=True)):
            if isinstance(arg, _MUTABLE) and (after := self.encoded(arg)) != before:
                changed.append([at, after])
        return ["changed", answer, changed] if changed else ["value", answer]


class _Own:
    """A function or object of the test that was passed to the program."""

    def __init__(self, served: _Served, number: int) -> None:
        self._served, self._number = served, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        served = self._served
        named = [[key, served.encoded(arg)] for key, arg in kwargs.items()]
        served.pipe.send(["own", self._number, "", [served.encoded(arg) for arg in args], named])
        return served.until_answered()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._served.pipe.send(["own", self._number, name, [], []])
        return self._served.until_answered()


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "delitem": lambda target, key: target.__delitem__(key),
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "hash": hash,
    "eq": lambda target, other: bool(target == other),
    "iter": iter,
    "next": lambda target, count: list(islice(target, count)),
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    "isinstance": lambda target, instance: isinstance(instance, target),
    "operator": lambda target, name, other: getattr(target, name)(other),
}


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


def module(name: str) -> dict[str, Any]:
    """The namespace of a fresh module that is registered as dataclasses and pickle expect."""
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made.__dict__


def serve(fd: int, code: str) -> None:
    """Run the program, then answer until the judge closes the socket.

    The program is not `__main__` here, so its own demonstration under that guard stays out.
    """
    served = _Served(pipe := Pipe(fd))
    namespace = module("solution")
    try:
        exec(compile(code, "program", "exec"), namespace)
    except BaseException as error:
        pipe.send(["raised", words(error)])
        return
    names = [name for name in list(namespace) if isinstance(name, str) and not name.startswith("__")]
    pipe.send(["ready", names[:10_000]])
    served.until_answered()
