"""What a reward says of one completion, and the seam that every reward keeps to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rollout.types import Problem


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reward says of one completion."""

    value: float | None
    """`None`: the verifier failed (the gold does not parse, time or memory ran out)."""
    detail: str = ""
    """One line: why."""
    extracted: str | None = None
    """The final answer that was read out of the completion, where there is one."""


class Reward(Protocol):
    """Pure: the same problem and completion always get the same outcome."""

    name: str

    def __call__(self, problem: Problem, completion: str) -> Outcome: ...
