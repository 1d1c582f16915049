"""pytest's part in a test, as far as tests of small programs use it, and the run of test functions and classes.

The judge imports this in place of pytest: importing that takes longer than most programs run.
"""

import asyncio
import contextlib
import inspect
import io
import itertools
import math
import re
import sys
import unittest
from collections.abc import Callable, Iterator
from typing import Any


class ExceptionInfo:
    """What `raises` caught: `value` and `type`."""

    value: BaseException
    type: Any = None

    def match(self, pattern: str) -> bool:
        assert re.search(pattern, str(self.value)), f"{pattern!r} does not match {str(self.value)!r}"
        return True


@contextlib.contextmanager
def _raises(expected: Any, match: str | None) -> Iterator[ExceptionInfo]:
    info = ExceptionInfo()
    try:
        yield info
    except expected as error:
        info.value, info.type = error, type(error)
        if match is not None:
            info.match(match)
    else:
        raise AssertionError(f"did not raise {expected}")


def raises(expected: Any, call: Any = None, *args: Any, match: str | None = None, **kwargs: Any) -> Any:
    if call is None:
        return _raises(expected, match)
    with _raises(expected, match) as info:
        call(*args, **kwargs)
    return info


class approx:  # noqa: N801 - pytest's name
    """Equal within 1e-6 relatively or 1e-12; containers element by element."""

    def __init__(
        self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False
    ) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, actual: Any) -> bool:
        want = self.expected
        if isinstance(want, dict):
            return (
                isinstance(actual, dict)
                and want.keys() == actual.keys()
                and all(self._near(actual[k], want[k]) for k in want)
            )
        if isinstance(want, (list, tuple)) or hasattr(want, "tolist"):
            return len(want) == len(actual) and all(map(self._near, actual, want))
        return self._near(actual, want)

    def _near(self, actual: Any, want: Any) -> bool:
        numbers = (int, float, complex)
        if not (isinstance(actual, numbers) and isinstance(want, numbers)):
            return bool(actual == want)
        if want != want:
            return self.nan_ok and actual != actual
        rel = self.rel if self.rel is not None else 0.0 if self.abs is not None else 1e-6
        off = abs(actual - want)
        return actual == want or (
            math.isfinite(off) and off <= max(rel * abs(want), self.abs if self.abs is not None else 1e-12)
        )


class _Mark:
    """`mark.parametrize` collects its cases; other marks change nothing."""

    def __getattr__(self, name: str) -> Any:
        def mark(*args: Any, **_: Any) -> Any:
            def decorate(test: Any) -> Any:
                if name == "parametrize":
                    test.cases = [*getattr(test, "cases", []), args]
                return test

            return args[0] if name != "parametrize" and args and callable(args[0]) else decorate

        return mark


mark = _Mark()


def param(*values: Any, **_: Any) -> Any:
    return values


def fixture(function: Any = None, **_: Any) -> Any:
    if function is None:
        return fixture
    function.fixture = True
    return function


def fail(reason: str = "") -> None:
    raise AssertionError(reason)


class _Capsys:
    def readouterr(self) -> Any:
        out = sys.stdout.getvalue()  # type: ignore[attr-defined]
        sys.stdout.seek(0)
        sys.stdout.truncate()
        return type("Captured", (tuple,), {"out": out, "err": ""})((out, ""))


def run(found: list[Any]) -> None:
    """Run test functions and test classes, with their parameters; raises what a failing one raises."""
    for test in found:
        name = getattr(test, "__name__", "")
        if isinstance(test, type) and issubclass(test, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(test).run(result)
            if result.errors or result.failures:
                raise AssertionError((result.errors + result.failures)[0][1].strip().splitlines()[-1])
        elif isinstance(test, type) and name.startswith("Test"):
            for method in [name for name in dir(test) if name.startswith("test")]:
                instance = test()
                getattr(instance, "setup_method", lambda *_: None)(
                    *[None][: _takes(instance, "setup_method")]
                )
                _call(
                    getattr(instance, method),
                    {n: getattr(instance, n) for n in dir(test)} | _globals(getattr(test, method)),
                )
        elif callable(test) and name.startswith("test"):
            _call(test, _globals(test))


def _takes(instance: Any, name: str) -> int:
    return len(inspect.signature(getattr(instance, name)).parameters) if hasattr(instance, name) else 0


def _globals(function: Any) -> dict[str, Any]:
    return getattr(function, "__globals__", {})


def _call(test: Callable[..., Any], names: dict[str, Any]) -> None:
    cases: list[list[dict[str, Any]]] = []
    for keys, values in getattr(test, "cases", []):
        keys = [key.strip() for key in keys.split(",")] if isinstance(keys, str) else list(keys)
        cases.append([dict(zip(keys, value if len(keys) > 1 else [value], strict=True)) for value in values])
    for parts in itertools.product(*cases):
        given = {key: value for part in parts for key, value in part.items()}
        with contextlib.ExitStack() as stack:
            kwargs = {n: _value(n, given, names, stack) for n in inspect.signature(test).parameters}
            result = test(**kwargs)
            if inspect.iscoroutine(result):
                asyncio.run(result)


def _value(name: str, given: dict[str, Any], names: dict[str, Any], stack: contextlib.ExitStack) -> Any:
    """A parameter of a test: a case's, a fixture's, or `capsys`."""
    if name in given:
        return given[name]
    if name == "capsys":
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        return _Capsys()
    made = names[name]
    inner = {n: _value(n, given, names, stack) for n in inspect.signature(made).parameters}
    value = made(**inner)
    return (
        stack.enter_context(contextlib.contextmanager(lambda: value)())
        if inspect.isgenerator(value)
        else value
    )
