"""Rounds: from an index in the problem order to groups of graded rollouts, and the next rounds meanwhile.

Dynamic sampling refills a round until it has its number of groups with spread (DAPO, arXiv:2503.14476,
Sec. 3.2: a group whose rewards are all equal has no advantage). A queue of rounds is generated in the
background, one after the other, while the trainer works on earlier ones; each rollout carries the versions of
the weights that it was sampled with.

With a queue of d rounds, round t is begun when step t - d gets its rollouts and is trained on at step t, so
its weights lack the updates of d steps at most. Both sides wait: the generator for the trainer where d rounds
are complete, the trainer for the generator where its round is not. An engine in the trainer's process
generates round t from the weights of step t - d, whatever the timing: the run has the same bits every time.
A pool (`in_flight`) gets the weights of every step at once where d > 1, in the middle of rounds too, so
that its rollouts are younger, by an amount that depends on timing.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch

from model.policy import Policy
from rollout.engine import RolloutEngine
from rollout.types import Graded, Problem, Prompt, Rollout, SamplingParams, StdioTest

ARRAYS = ("token_ids", "logprobs")
"""What a `Rollout` holds as arrays."""
NEVER = -1
"""Stands for the version of an engine that has no weights."""
REFILL_SEED = 0x9E3779B1
"""Between the seeds of a round's refills, so that they use other random numbers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Size of a round, and how it is filled."""

    groups: int
    group_size: int
    dynamic: bool = False  # only groups with spread count; other problems replace the rest
    most_requests: int = 4  # of dynamic sampling, after which groups without spread fill the round


@dataclass(frozen=True, slots=True)
class Round:
    """The rollouts that one step trains on."""

    graded: tuple[Graded, ...]  # group by group
    cursor: int  # problems used so far: the index at which the next round begins
    sampled: int  # groups that were sampled for it, those left out included
    sample_s: float = 0.0
    grade_s: float = 0.0
    tokens: int = 0  # completion tokens that were sampled, those left out included
    engine: dict[str, float] = field(default_factory=dict)  # the engine's metrics, by name
    sync_s: float = 0.0  # until the engine had the policy's weights
    wait_s: float = 0.0  # until the round was complete, after that

    def versions(self) -> list[int]:
        """Optimizer updates in the weights that each of its rollouts began with."""
        return [g.rollout.policy_version for g in self.graded]

    def plain(self) -> dict[str, Any]:
        """As dicts, lists and tensors, for a checkpoint."""
        values = asdict(self)
        for graded in values["graded"]:
            for name in ARRAYS:
                graded["rollout"][name] = torch.from_numpy(np.asarray(graded["rollout"][name]))
        return values

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Self:
        """The inverse of `plain`."""
        return cls(**values | {"graded": tuple(map(_graded, values["graded"]))})


def _graded(values: dict[str, Any]) -> Graded:
    rollout = values["rollout"]
    prompt = rollout["prompt"]
    tests = tuple(StdioTest(**t) if isinstance(t, dict) else t for t in prompt["problem"]["tests"])
    problem = Problem(**prompt["problem"] | {"tests": tests})
    arrays = {name: rollout[name].tolist() for name in ARRAYS}
    made = Rollout(**rollout | arrays | {"prompt": Prompt(**prompt | {"problem": problem})})
    return Graded(**values | {"rollout": made})


class RolloutSource:
    """Rounds of graded rollouts, one after the other, from an engine that gets the policy's weights."""

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: Callable[[int, int], list[Prompt]],
        grade: Callable[[Sequence[Rollout]], list[Graded]],
        plan: Plan,
    ) -> None:
        """
        Args:
            prompts: (index, n) -> n prompts, from that index of the endless problem order on.
            grade: rollouts -> graded, in order; called in the thread that generates.
        """
        self.engine, self.prompts, self.grade, self.plan = engine, prompts, grade, plan
        self.cursor = 0  # problems used so far, by pending rounds too
        self.synced = 0  # optimizer updates in the engine's own weights
        self.thread: ThreadPoolExecutor | None = None
        self.pending = deque[Future[Round]]()  # the rounds of the next steps, in order

    @property
    def in_place(self) -> bool:
        """Whether the engine generates from the trainer's own tensors."""
        return self.engine.in_place

    def sync(self, policy: Policy, version: int) -> None:
        """Have the engine generate from `policy`, as it is after `version` optimizer updates."""
        if self.in_place or self.synced != version:
            self.engine.load_weights(policy, version)
        self.synced = version

    def rest(self) -> None:
        """Have the engine free what it can while the trainer works."""
        if self.engine.rest():
            self.synced = NEVER

    def next(self, policy: Policy, version: int, *samplings: SamplingParams) -> Round:
        """The next round.

        Args:
            policy: sampled from, unless the round was begun ahead.
            version: its optimizer updates.
            samplings: of this round and of those after it that may be begun now, from the weights as they are
                now, in the background. Those that are pending come first and stay as they are.
        """
        began, in_flight = time.monotonic(), self.engine.in_flight
        if not self.pending or (in_flight and len(self.pending) > 1):
            self.sync(policy, version)
        sync_s = time.monotonic() - began
        done = self.take() or self.round(samplings[0])
        wait_s = time.monotonic() - began - sync_s
        more = samplings[1 + len(self.pending) :]
        if more or self.pending:
            direct = in_flight or not (self.in_place or self.pending)
            if direct:  # the engine has weights of its own, and takes them now
                self.sync(policy, version)
            weights = None if direct or not more else (policy.frozen(), version)
            for sampling in more:
                self.begin(sampling, weights)
        else:
            self.rest()
        return replace(done, sync_s=sync_s, wait_s=wait_s)

    def round(self, sampling: SamplingParams, weights: tuple[Policy, int] | None = None) -> Round:
        """Generate and grade the next round in the problem order, from these weights if any."""
        if weights is not None:
            self.sync(*weights)
        done = self.collect(self.cursor, sampling)
        self.cursor = done.cursor
        return done

    def collect(self, cursor: int, sampling: SamplingParams) -> Round:
        """Generate and grade a round whose problems begin at index `cursor`."""
        plan, kept, spare = self.plan, list[list[Graded]](), list[list[Graded]]()
        sampled = tokens = 0
        sample_s = grade_s = 0.0
        self.engine.drain()  # metrics of other requests
        for request in range(plan.most_requests if plan.dynamic else 1):
            need = plan.groups - len(kept)
            began = time.monotonic()
            seeded = replace(sampling, seed=sampling.seed + request * REFILL_SEED) if request else sampling
            rollouts = sample_groups(self.engine, self.prompts(cursor + sampled, need), seeded)
            sampled += need
            tokens += sum(r.sampled for r in rollouts)
            then = time.monotonic()
            graded = self.grade(rollouts)
            sample_s, grade_s = sample_s + then - began, grade_s + time.monotonic() - then
            for start in range(0, len(graded), plan.group_size):
                group = graded[start : start + plan.group_size]
                (kept if not plan.dynamic or has_spread(group) else spare).append(group)
            if len(kept) == plan.groups:
                break
        kept += spare[: plan.groups - len(kept)]
        graded_groups = tuple(g for group in kept for g in group)
        metrics = self.engine.drain()
        return Round(graded_groups, cursor + sampled, sampled, sample_s, grade_s, tokens, metrics)

    def begin(self, sampling: SamplingParams, weights: tuple[Policy, int] | None) -> None:
        """Start a `round` in the background, after those that are pending, for `take`. Until then no other
        code may have the engine generate."""
        if self.thread is None:
            self.thread = ThreadPoolExecutor(1, "collect")
        self.pending.append(self.thread.submit(self.round, sampling, weights))

    def settle(self) -> list[Round]:
        """Wait for all pending rounds and return them, still to be taken."""
        return [each.result() for each in self.pending]

    def take(self) -> Round | None:
        """The next of the pending rounds, when it is complete; None without one."""
        return self.pending.popleft().result() if self.pending else None

    def state_dict(self) -> dict[str, Any]:
        """What the next round depends on, pending rounds included: their weights are gone at resume."""
        ahead = [done.plain() for done in self.settle()]
        return {"cursor": self.cursor, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.cursor = state["cursor"]
        for values in state["ahead"]:
            self.pending.append(Future())
            self.pending[-1].set_result(Round.from_plain(values))

    def close(self) -> None:
        """Wait for the round under way and drop all that are pending; stop the engine."""
        if self.thread is not None:
            self.thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()


def sample_groups(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Rollout]:
    """Rollouts in the order of the prompts, group by group.
    Raises `RuntimeError`: the engine lost a rollout, or returned one twice."""
    rollouts = sorted(engine.generate(prompts, sampling), key=lambda r: (r.index, r.sample))
    rollouts = [replace(r, max_tokens=sampling.max_tokens) for r in rollouts]
    names = [(r.index, r.sample) for r in rollouts]
    expected = [(i, s) for i in range(len(prompts)) for s in range(sampling.n)]
    if names != expected:
        lost, extra = len(set(expected) - set(names)), len(names) - len(set(names))
        kind, due = type(engine).__name__, len(expected)
        raise RuntimeError(f"{kind} lost {lost} of {due} rollouts and doubled {extra}")
    return rollouts


def has_spread(group: Sequence[Graded]) -> bool:
    """Whether the rewards of a group differ, those whose verifier failed left out."""
    rewards = [g.reward for g in group if g.verdict != "error"]
    return bool(rewards) and max(rewards) - min(rewards) > 1e-8
