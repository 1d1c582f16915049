"""What tests of small programs use of pytest, and the run of test functions and classes.

The judge imports this in place of pytest, whose import takes longer than most programs run.
"""

import contextlib
import functools
import inspect
import io
import itertools
import re
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _raises(expected: Any, match: str | None) -> Iterator[types.SimpleNamespace]:
    info = types.SimpleNamespace(value=None, type=None)
    try:
        yield info
    except expected as error:
        info.value, info.type = error, type(error)
        assert match is None or re.search(match, str(error)), f"{str(error)!r} does not match {match!r}"
    else:
        raise AssertionError(f"did not raise {expected}")


def raises(expected: Any, call: Any = None, *args: Any, match: str | None = None, **kwargs: Any) -> Any:
    """A context in which `expected` must be raised, or a call that must raise it."""
    if call is None:
        return _raises(expected, match)
    with _raises(expected, match) as info:
        call(*args, **kwargs)
    return info


class approx:
    """Equal to 1e-6 of the expected value, or to 1e-12; containers element by element."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self.expected, self.rel, self.abs = expected, rel, abs

    def __eq__(self, actual: Any) -> bool:
        want = self.expected
        if isinstance(want, dict):
            same = isinstance(actual, dict) and want.keys() == actual.keys()
            return same and all(self._near(actual[key], want[key]) for key in want)
        if hasattr(want, "__len__") and not isinstance(want, str):
            return len(want) == len(actual) and all(map(self._near, actual, want))
        return self._near(actual, want)

    def _near(self, actual: Any, want: Any) -> bool:
        if not all(isinstance(value, (int, float, complex)) for value in (actual, want)) or actual == want:
            return bool(actual == want)
        rel = self.rel if self.rel is not None else 0 if self.abs is not None else 1e-6
        return (
            abs(actual - want) <= max(rel * abs(want), 1e-12 if self.abs is None else self.abs) < float("inf")
        )


class _Mark:
    def __getattr__(self, name: str) -> Any:
        """`parametrize` collects cases; other marks change nothing."""

        def mark(*args: Any, **_: Any) -> Any:
            def decorate(test: Any) -> Any:
                if name == "parametrize":
                    test.cases = [*getattr(test, "cases", []), args[:2]]
                return test

            return args[0] if name != "parametrize" and args and callable(args[0]) else decorate

        return mark


mark = _Mark()


def param(*values: Any, **_: Any) -> Any:
    """A case of `parametrize`."""
    return values if len(values) > 1 else values[0]


def fixture(function: Any = None, **_: Any) -> Any:
    """A function whose value tests take by its name."""
    return function or fixture


def fail(reason: str = "") -> None:
    """End a test as failed."""
    raise AssertionError(reason)


def run(found: list[Any]) -> None:
    """Run test functions and classes, with their parameters; raises what a failing one raises."""
    unittest: Any = sys.modules.get("unittest")  # where the tests have imported it
    for test in found:
        if unittest and isinstance(test, type) and issubclass(test, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(test).run(result)
            for _, trace in result.errors + result.failures:
                raise AssertionError(trace.strip().splitlines()[-1])
        elif isinstance(test, type) and test.__name__.startswith("Test"):
            for name in (name for name in dir(test) if name.startswith("test")):
                instance = test()
                if setup := getattr(instance, "setup_method", None):
                    setup(*[None] * len(inspect.signature(setup).parameters))
                _call(getattr(instance, name), instance)
        elif isinstance(test, types.FunctionType) and test.__name__.startswith("test"):
            _call(test, None)


def _call(test: Any, instance: Any) -> None:
    cases = []
    for keys, values in getattr(test, "cases", []):
        keys = re.split(r"[,\s]+", keys.strip()) if isinstance(keys, str) else keys
        cases.append([dict(zip(keys, v if len(keys) > 1 else [v], strict=True)) for v in values])
    for parts in itertools.product(*cases):
        given: dict[str, Any] = functools.reduce(dict.__or__, parts, {})
        with contextlib.ExitStack() as stack:
            result = test(**_filled(test, instance, given, stack))
            if inspect.iscoroutine(result):
                sys.modules["asyncio"].run(result)


def _filled(test: Any, instance: Any, given: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, Any]:
    """The parameters of a test or fixture: a case's values, fixtures, `capsys`."""
    out = {}
    for name in inspect.signature(test).parameters:
        if name in given:
            out[name] = given[name]
        elif name == "capsys":
            text = stack.enter_context(contextlib.redirect_stdout(Captured()))
            out[name] = types.SimpleNamespace(readouterr=text.readouterr)
        else:
            made = getattr(instance, name, None) or test.__globals__.get(name)
            if made is None:
                raise ModuleNotFoundError(name=f"the fixture {name}")
            value = made(**_filled(made, instance, given, stack))
            out[name] = next(value) if inspect.isgenerator(value) else value
            if inspect.isgenerator(value):
                stack.callback(next, value, None)
    return out


class Captured(io.StringIO):
    """Text printed, until it is taken."""

    def taken(self) -> str:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text

    def readouterr(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(out=self.taken(), err="")
