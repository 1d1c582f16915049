"""Rounds: from the place in the problem order to groups of graded rollouts, and the next round meanwhile.

Dynamic sampling refills a round until it has its number of groups with spread (DAPO, arXiv:2503.14476,
Sec. 3.2: a group whose rewards are all equal teaches nothing). Overlap draws a round while the one before is
trained on, so that its rollouts are one step off-policy; the bound is kept by construction, and each rollout
carries the version that it was drawn from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rollout.engine import RolloutEngine
from rollout.types import Graded, Problem, Prompt, Rollout, SamplingParams, StdioTest

REFILL_SEED = 0x9E3779B1
"""Between the seeds of a round's refills, so that their places draw other numbers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a round is filled."""

    groups: int
    """Groups of a round."""
    group_size: int
    dynamic: bool = False
    """Only groups with spread count; the others are drawn again with other problems."""
    most_draws: int = 4
    """Dynamic sampling: requests after which the round is filled up with what there is."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one step trains on."""

    graded: tuple[Graded, ...]
    """Group by group."""
    cursor: int
    """Problems used up so far: where the next round begins."""
    drawn: int
    """Groups that were drawn for it, those left out included."""
    draw_s: float = 0.0
    grade_s: float = 0.0
    tokens: int = 0
    """Completion tokens that were drawn, those left out included."""
    engine: dict[str, float] = field(default_factory=dict)
    """What the engine had to say, by metric name."""

    def versions(self) -> tuple[int, int]:
        """Oldest and newest policy among its rollouts."""
        found = [g.rollout.policy_version for g in self.graded]
        return min(found), max(found)

    def plain(self) -> dict[str, Any]:
        """As dicts and lists, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Round:
        """What `plain` gave, as it was."""
        return cls(**values | {"graded": tuple(map(_graded, values["graded"]))})


def _graded(values: dict[str, Any]) -> Graded:
    rollout = values["rollout"]
    prompt = rollout["prompt"]
    tests = tuple(StdioTest(**t) if isinstance(t, dict) else t for t in prompt["problem"]["tests"])
    problem = Problem(**prompt["problem"] | {"tests": tests})
    made = Rollout(**rollout | {"prompt": Prompt(**prompt | {"problem": problem})})
    return Graded(**values | {"rollout": made})


class Collector:
    """Fills rounds from an engine."""

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: Callable[[int, int], list[Prompt]],
        grade: Callable[[Sequence[Rollout]], list[Graded]],
        plan: Plan,
    ) -> None:
        """
        Args:
            engine: draws.
            prompts: (place, number) -> that many prompts from that place of the endless problem order on.
            grade: rollouts -> graded, in order; called in the thread that draws.
            plan: of a round.
        """
        self.engine, self.prompts, self.grade, self.plan = engine, prompts, grade, plan
        self.thread: ThreadPoolExecutor | None = None
        self.pending: Future[Round] | None = None

    def collect(self, cursor: int, sampling: SamplingParams) -> Round:
        """Draw and grade a round whose problems begin at place `cursor`."""
        plan, kept, spare = self.plan, list[list[Graded]](), list[list[Graded]]()
        drawn = tokens = 0
        draw_s = grade_s = 0.0
        self.engine.drain()  # of what others drew
        for request in range(plan.most_draws if plan.dynamic else 1):
            need = plan.groups - len(kept)
            began = time.monotonic()
            seeded = replace(sampling, seed=sampling.seed + request * REFILL_SEED) if request else sampling
            rollouts = draw(self.engine, self.prompts(cursor + drawn, need), seeded)
            drawn += need
            tokens += sum(len(r.token_ids) for r in rollouts)
            then = time.monotonic()
            graded = self.grade(rollouts)
            draw_s, grade_s = draw_s + then - began, grade_s + time.monotonic() - then
            for start in range(0, len(graded), plan.group_size):
                group = graded[start : start + plan.group_size]
                (kept if not plan.dynamic or has_spread(group) else spare).append(group)
            if len(kept) == plan.groups:
                break
        kept += spare[: plan.groups - len(kept)]
        graded_groups = tuple(g for group in kept for g in group)
        said = self.engine.drain()
        return Round(graded_groups, cursor + drawn, drawn, draw_s, grade_s, tokens, said)

    def begin(self, cursor: int, sampling: SamplingParams) -> None:
        """Start a round in the background; `take` gives it. The engine is its own until then."""
        assert self.pending is None, "a round is under way already"
        if self.thread is None:
            self.thread = ThreadPoolExecutor(1, "collect")
        self.pending = self.thread.submit(self.collect, cursor, sampling)

    def settle(self) -> Round | None:
        """The round under way, once it is complete; it stays to be taken. None where there is none."""
        return self.pending.result() if self.pending else None

    def take(self) -> Round | None:
        """As `settle`, and it is gone."""
        done, self.pending = self.settle(), None
        return done

    def put(self, done: Round) -> None:
        """A round that was saved with a checkpoint, to be taken next."""
        self.pending = Future()
        self.pending.set_result(done)

    def close(self) -> None:
        """Wait for what is under way and drop it."""
        if self.thread is not None:
            self.thread.shutdown(wait=True, cancel_futures=True)


def draw(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
    """Rollouts in the order of the prompts, group by group.

    Raises:
        RuntimeError: the engine lost a rollout, or gave one twice.
    """
    rollouts = sorted(engine.generate(prompts, sampling), key=lambda r: (r.index, r.sample))
    rollouts = [replace(r, max_tokens=sampling.max_tokens) for r in rollouts]
    names = [(r.index, r.sample) for r in rollouts]
    want = [(i, s) for i in range(len(prompts)) for s in range(sampling.n)]
    if names != want:
        lost, extra = len(set(want) - set(names)), len(names) - len(set(names))
        raise RuntimeError(f"{type(engine).__name__} lost {lost} of {len(want)} rollouts and doubled {extra}")
    return rollouts


def has_spread(group: Sequence[Graded]) -> bool:
    """Whether the rewards of a group differ, those whose verifier failed left out."""
    rewards = [g.reward for g in group if g.verdict != "error"]
    return bool(rewards) and max(rewards) - min(rewards) > 1e-8
