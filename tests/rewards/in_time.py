"""A grader's promise to answer within a second of its limit, on a machine that others load too."""

from __future__ import annotations

import time
from collections.abc import Callable

from rewards.maths import grade as math_answer
from rewards.programs import grade as code
from rewards.registry import Outcome

GRACE_S = 1.0
TRIES = 3
"""A loaded machine may keep a process waiting for a second; a grader that is late is late every time."""


def outcomes_in_time(grade: Callable[[], Outcome], limit_s: float) -> list[Outcome]:
    """Outcomes of `grade`, nothing remembered, until one comes within `limit_s` and a second; three tries."""
    outcomes, took = [], []
    while len(outcomes) < TRIES:
        code._results.clear()
        math_answer.grade_math.cache_clear()
        start = time.monotonic()
        outcomes.append(grade())
        took.append(time.monotonic() - start)
        if took[-1] < limit_s + GRACE_S:
            return outcomes
    raise AssertionError(f"with a limit of {limit_s} s it took {took} s")
