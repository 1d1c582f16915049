"""A reward: a function of a problem and a completion, registered under a name with one line that explains it.

    @reward("format", "share of rollouts in the think/answer format")
    def format_reward(problem: Problem, completion: str) -> float: ...

It returns a float, or an `Outcome` with a detail. A third parameter named `rollout` receives the `Rollout`,
for rewards that need tokens, finish reason or limits. Rewards are pure: equal arguments give equal values.

A reward has three outcomes: a value, which may be 0, or *the verifier failed*. A failure is never a silent 0:
the rollout is dropped from the loss and counted (`verdict == "error"`).

A user's own function needs no registration: `"module:function"` names it, and the first line of its docstring
explains it.
"""

import difflib
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from rewards.wire import words
from rollout.types import Problem, Rollout, Verdict

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reward found for one completion."""

    value: float | None  # `None`: the verifier failed (the gold does not parse, time or memory ran out)
    detail: str = ""  # why, one line
    extracted: str | None = None  # the final answer that was read out of the completion, where there is one


def verdict_of(outcome: Outcome) -> Verdict:
    """`correct` only for full marks; partial credit is a reward, not a verdict."""
    if outcome.value is None:
        return "error"
    return "correct" if outcome.value == 1 else "incorrect"


@dataclass(frozen=True, slots=True)
class Reward:
    """A function with its name; calling it always gives an `Outcome`."""

    name: str  # of its part in samples.jsonl and, behind `reward/`, of its metric
    summary: str  # what its mean over a step says, one line of the glossary
    function: Function
    takes_rollout: bool

    def __call__(self, problem: Problem, completion: str, rollout: Rollout) -> Outcome:
        """The outcome. An exception, or a value that is no finite number, is a failure of the verifier."""
        named = {"rollout": rollout} if self.takes_rollout else {}
        try:
            result = self.function(problem, completion, **named)
            if result is None or isinstance(result, str):
                raise TypeError(f"a reward returns a number or an Outcome, not {result!r}")
            outcome = result if isinstance(result, Outcome) else Outcome(float(result))
            if outcome.value is not None and not math.isfinite(outcome.value):
                return Outcome(None, f"{self.name} returned {outcome.value}, which is no finite number")
        except Exception as error:
            return Outcome(None, f"{self.name} raised {words(error)}")
        return outcome


REWARDS: dict[str, Reward] = {}
"""The registered rewards by name."""


def reward(name: str, summary: str) -> Callable[[Function], Function]:
    """Register the function below under `name`. `summary` says in one line what the mean of its values is."""

    def register(function: Function) -> Function:
        REWARDS[name] = Reward(name, summary, function, _takes_rollout(name, function))
        return function

    return register


def find(name: str) -> Reward:
    """The registered reward `name`, or the user's function "module:function".

    ValueError, in one line with the nearest name: there is none, or its parameters are not a reward's."""
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)
        raise ValueError(
            f"no reward {name!r}; did you mean {near[0]}? Registered: {', '.join(sorted(REWARDS))}; "
            'a function of your own is "module:function".'
        )
    function = own_function(name, "reward")
    takes_rollout = _takes_rollout(name, function)
    summary = (inspect.getdoc(function) or f"mean of {name}, which has no docstring").strip().splitlines()[0]
    return Reward(name.partition(":")[2], summary, function, takes_rollout)


def own_function(name: str, what: str = "loss") -> Function:
    """The user's function "module:function", from a file of the working directory or an installed module.

    ValueError, in one line with the nearest name, where there is none; `what` says what the function is for.
    """
    where, _, attribute = name.partition(":")
    module = _imported(name, where, what)
    found: Function | None = getattr(module, attribute, None)
    if found is None or not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(attribute, functions, n=1, cutoff=0.0)
        hint = f"; did you mean {where}:{near[0]}?" if near else ", nor any other"
        raise ValueError(f"{what} {name!r}: {where} has no function {attribute!r}{hint}")
    return found


def _imported(name: str, where: str, what: str) -> ModuleType:
    """The module `where`: a file of the working directory, or else an installed module."""
    here = os.getcwd()  # on the path already under `python -m`, but not under every launcher
    sys.path.insert(0, here)
    try:
        return import_module(where)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == where:
            why = f"no file {where.replace('.', '/')}.py in {here}, and no installed module of this name"
        else:
            why = f"module {where} cannot be imported: {words(error)}"
        raise ValueError(f"{what} {name!r}: {why}") from error
    finally:
        sys.path.remove(here)


def _takes_rollout(name: str, function: Function) -> bool:
    """Whether the function has the third parameter `rollout`; ValueError: its parameters are no reward's."""
    has = "parameters that Python cannot read"
    try:
        signature = inspect.signature(function)
        has = str(signature.replace(return_annotation=inspect.Signature.empty))
        takes_rollout = "rollout" in signature.parameters
        signature.bind("problem", "completion", **({"rollout": None} if takes_rollout else {}))
    except (TypeError, ValueError):
        raise ValueError(
            f"reward {name!r} takes {has}; expected (problem, completion) or (problem, completion, rollout)."
        ) from None
    return takes_rollout
