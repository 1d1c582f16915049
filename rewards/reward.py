"""The reward of a rollout: a weighted sum of rewards by name, every part kept.

R1-Zero adds accuracy and format, R1's first RL stage also language consistency, summed directly
(arXiv:2501.12948, Sec. 2.2.2 and 2.3.2). What a reward is: `rewards.registry`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Self

from rewards.accuracy import Accuracy
from rewards.maths.extract import Mode
from rewards.pool import WorkerPool
from rewards.registry import REWARDS, Outcome, Reward, find, reward, verdict_of
from rewards.style import overlong_reward
from rollout.types import Graded, Problem, Rollout

__all__ = ["REWARDS", "Accuracy", "Outcome", "Scorer", "check_weights", "error_share", "reward", "verdict_of"]

ALWAYS = ("accuracy", "format", "language", "repetition")
"""Rewards that are computed and logged whatever their weight, in this order."""


@reward("environment", "mean of the environment's own score; 0 where it gave none")
def environment_reward(problem: Problem, completion: str, rollout: Rollout) -> float:
    """What the environment gave the rollout when it ended it."""
    return rollout.score or 0.0


def check_weights(weights: Mapping[str, float]) -> list[tuple[Reward, float]]:
    """Check `[rewards]`, name = weight; a user's module is imported for it, torch is not.

    Returns rewards and weights in the order of the sum: those of `ALWAYS`, then the others as `weights` has
    them. ValueError, in one line: no such reward, module or function, parameters that are not a reward's, two
    rewards of one name, or a weight that is no finite number."""
    found: dict[str, tuple[Reward, float]] = {}
    for key, weight in {**dict.fromkeys(ALWAYS, 0.0), **weights}.items():
        entry = find(key)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {key!r} must be a finite number, not {weight!r}.")
        if entry.name in found:
            raise ValueError(
                f"reward {key!r} has the name of another reward, {entry.name}: rename the function."
            )
        found[entry.name] = entry, float(weight)
    return list(found.values())


def error_share(graded: Sequence[Graded]) -> tuple[float, str]:
    """Share of the rollouts whose verifier failed, and the most frequent reason; 0 and "" where none did."""
    reasons = Counter(g.detail for g in graded if g.verdict == "error")
    if not reasons:
        return 0.0, ""
    return reasons.total() / len(graded), reasons.most_common(1)[0][0]


class Scorer:
    """Grade rollouts with every reward that has a weight, and those of `ALWAYS`, and add the parts up.

    Args:
        weights: By name, or by "module:function" for a user's own; raises what `check_weights` raises.
        mode: How the final answer is looked for: `strict` to train, `lenient` to evaluate.
        partial_credit: Code earns the share of tests that it passes.
        workers: Child processes for programs and slow mathematics; default min(2, cpus).
        overlong_buffer: Length of the ramp of the reward `overlong`, tokens (DAPO's L_cache).
        allow_unsafe_code: Run programs too where the kernel cannot confine them; else they are errors.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        mode: Mode = "strict",
        partial_credit: bool = False,
        workers: int | None = None,
        overlong_buffer: int = 0,
        allow_unsafe_code: bool = False,
    ) -> None:
        ramp = partial(overlong_reward, buffer_tokens=overlong_buffer)
        self._rewards = [
            (dataclasses.replace(entry, function=ramp) if entry.name == "overlong" else entry, weight)
            for entry, weight in check_weights(weights)
        ]
        self.pool = WorkerPool(workers, allow_unsafe_code=allow_unsafe_code)
        self._accuracy = Accuracy(mode, partial_credit, self.pool)

    def grade(self, rollout: Rollout, text: str) -> Graded:
        """Grade one rollout whose completion, prefill included and stop token left out, reads `text`."""
        return self._assemble(rollout, text, self._accuracy(rollout.prompt.problem, text))

    def grade_all(self, pairs: Iterable[tuple[Rollout, str]]) -> list[Graded]:
        """Grade many, in order; programs and slow mathematics run side by side in the workers."""
        pairs = list(pairs)
        outcomes: list[Outcome | Future[Outcome]] = []
        for rollout, text in pairs:
            problem = rollout.prompt.problem
            quick, _ = self._accuracy.quick(problem, text)
            outcomes.append(quick or self.pool.submit(self._accuracy, problem, text))
        return [
            self._assemble(rollout, text, outcome.result() if isinstance(outcome, Future) else outcome)
            for (rollout, text), outcome in zip(pairs, outcomes, strict=True)
        ]

    def glossary(self) -> dict[str, str]:
        """What each reward's metric says, one line by metric name."""
        return {f"reward/{entry.name}": entry.summary for entry, _ in self._rewards}

    def close(self) -> None:
        """Stop the children, and cancel what waits for them. A closed scorer grades no more."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _assemble(self, rollout: Rollout, text: str, accuracy: Outcome) -> Graded:
        problem = rollout.prompt.problem
        parts: dict[str, float] = {}
        total = 0.0
        verdict, detail = verdict_of(accuracy), accuracy.detail
        if rollout.failure:
            verdict, detail = "error", rollout.failure
        for entry, weight in self._rewards:
            outcome = accuracy if entry.name == "accuracy" else entry(problem, text, rollout)
            if outcome.value is not None:
                parts[entry.name] = outcome.value
                total += weight * outcome.value
            elif verdict != "error":
                verdict, detail = "error", outcome.detail
        return Graded(rollout, text, parts, total, verdict, detail)
