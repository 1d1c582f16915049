"""A queue of rounds: how old its weights may be, whoever is slow; resume, and an end with rounds pending."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from rollout.collect import Plan, RolloutSource
from rollout.types import Graded, Problem, Prompt, Rollout, SamplingParams

STEPS, DEPTH = 9, 4
OLD = [0, 0, 0, 0, 0, 1, 2, 3, 4]
"""Weights of each step's rounds: those of the start at first, then the queue's depth behind."""


class Weights:
    """Stands for a policy: a number that training changes in place."""

    def __init__(self, number=0):
        self.number, self.copies = number, []

    def frozen(self):
        self.copies.append(Weights(self.number))
        return self.copies[-1]


class Engine:
    """Each token of a round is the number of the weights that it has at that moment."""

    in_place = in_flight = False

    def __init__(self, tokens=3, seconds=0.0):
        self.tokens, self.seconds, self.began, self.closed = tokens, seconds, 0, False
        self.source, self.version, self.loads = Weights(), 0, []  # those of its checkpoint

    def generate(self, prompts, sampling):
        self.began += 1
        rows = [[] for _ in range(len(prompts) * sampling.n)]
        first = self.version
        for _ in range(self.tokens):
            time.sleep(self.seconds)
            for row in rows:
                row.append(self.held())
        for i, ids in enumerate(rows):
            index, sample = divmod(i, sampling.n)
            logprobs = [-float(sampling.seed)] * len(ids)
            made = (prompts[index], index, sample, ids, logprobs, "length", first)
            yield Rollout(*made, last_version=self.version)

    def load_weights(self, source, version):
        self.source, self.version = source, version
        self.loads.append(version)

    def held(self):
        return self.source.number

    def rest(self):
        return False

    def drain(self):
        return {}

    def close(self):
        self.closed = True


class InPlace(Engine):
    """Reads the trainer's own weights: it must be given a copy."""

    in_place = True


class Copying(Engine):
    """Has weights of its own in the trainer's process: copied as they are loaded."""

    def load_weights(self, source, version):
        super().load_weights(Weights(source.number), version)


class InFlight(Copying):
    """Takes weights in the middle of a request."""

    in_flight = True


def prompts(place, count):
    return [Prompt(Problem(str(at), "math", ""), "raw", (at + 1,)) for at in range(place, place + count)]


def grade(rollouts):
    return [Graded(r, "", {"a": 1.0}, float(r.sample)) for r in rollouts]


def source_of(engine, **plan):
    return RolloutSource(engine, prompts, grade, Plan(2, 2, **plan))


def steps(source, policy, begin, end, slow_s=0.0, depth=DEPTH, watch=lambda step: None):
    """Rounds of the steps from `begin` up to, without, `end`, as the trainer asks for them."""
    out = []
    for step in range(begin, end):
        last = min(step + depth, STEPS - 1)
        done = source.next(policy, step, *(SamplingParams(3, n=2, seed=at) for at in range(step, last + 1)))
        assert all(step - g.rollout.policy_version <= depth for g in done.graded)
        assert len(source.pending) <= depth
        time.sleep(slow_s)
        watch(step)
        policy.number += 1
        out.append([(g.rollout, g.reward) for g in done.graded])
    return out


@pytest.mark.parametrize("kind", [InPlace, Copying])
@pytest.mark.parametrize(("trainer_s", "engine_s"), [(0, 0), (0.03, 0), (0, 0.01)])
def test_the_weights_of_a_round_are_those_of_a_fixed_step(kind, trainer_s, engine_s):
    """Whoever is slow: the trainer waits for the engine, and the engine never begins a round too early."""
    engine = kind(seconds=engine_s)
    source = source_of(engine)

    def watch(step):
        assert engine.began <= step + 1 + DEPTH

    found = steps(source, Weights(), 0, STEPS, trainer_s, watch=watch)
    for step, (rows, weights) in enumerate(zip(found, OLD, strict=True)):
        assert {r.policy_version for r, _ in rows} == {r.last_version for r, _ in rows} == {weights}
        assert {token for r, _ in rows for token in r.token_ids} == {weights}
        assert {r.logprobs[0] for r, _ in rows} == {-float(step)}
        assert [int(r.prompt.problem.id) for r, _ in rows[::2]] == [2 * step, 2 * step + 1]
    source.close()
    assert engine.closed and engine.began == STEPS


def test_a_slow_trainer_finds_the_queue_full_and_no_more():
    engine = InPlace()
    source = source_of(engine)
    steps(source, Weights(), 0, 2)
    source.settle()
    time.sleep(0.1)
    assert engine.began == 2 + DEPTH == len(source.pending) + 2
    source.close()


def test_a_copy_of_the_weights_a_step_and_none_where_the_engine_has_its_own():
    policy, source = Weights(), source_of(InPlace())
    steps(source, policy, 0, STEPS)
    assert [copy.number for copy in policy.copies] == [0, 1, 2, 3, 4]
    policy, source = Weights(), source_of(Copying())
    steps(source, policy, 0, STEPS, depth=1)
    assert not policy.copies and source.engine.loads == [*range(1, STEPS - 1)]


@pytest.mark.parametrize(("trainer_s", "engine_s", "most"), [(0, 0.01, DEPTH), (0.1, 0, 2)])
def test_as_many_copies_live_as_rounds_wait(trainer_s, engine_s, most):
    """`pipeline.train.memory` counts them: that of a round is dropped when the round is complete."""
    alive, seen = weakref.WeakSet(), []

    class Counted(Weights):
        def frozen(self):
            made = Weights(self.number)
            alive.add(made)
            seen.append(len(alive))
            return made

    source = source_of(InPlace(seconds=engine_s))
    steps(source, Counted(), 0, STEPS, trainer_s)
    assert max(seen) == most
    source.close()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 6, 8])
def test_resumed_from_a_checkpoint_the_rounds_are_the_same(stop, dynamic):
    whole = steps(source_of(InPlace(), dynamic=dynamic), Weights(), 0, STEPS)
    first = source_of(InPlace(), dynamic=dynamic)
    before = steps(first, Weights(), 0, stop)
    state = first.state_dict()
    first.close()
    assert len(state["ahead"]) == min(DEPTH, STEPS - stop)
    again = source_of(InPlace(), dynamic=dynamic)
    again.load_state_dict(state)
    assert before + steps(again, Weights(stop), stop, STEPS) == whole


def test_closing_ends_the_round_under_way_and_begins_none_of_those_behind_it():
    engine = InPlace(seconds=0.05)
    source = source_of(engine)
    steps(source, Weights(), 0, 1)
    while engine.began < 2:
        time.sleep(0.001)
    source.close()
    assert engine.closed and engine.began == 2 and source.pending[0].done()
    assert [each.cancelled() for each in source.pending] == [False, True, True, True]


def test_a_fault_in_the_background_is_the_trainers_at_that_round():
    engine = InPlace()
    source = source_of(engine)
    steps(source, Weights(), 0, 1)
    source.settle()
    engine.tokens = None
    steps(source, Weights(1), 1, 1 + DEPTH)  # those that are complete
    with pytest.raises(TypeError):
        steps(source, Weights(5), 1 + DEPTH, 2 + DEPTH)
    source.close()


def test_an_engine_that_takes_weights_in_flight_gets_them_of_every_step():
    """In the middle of a round too; its rollouts tell the versions of both ends."""
    engine, gate = InFlight(tokens=4), threading.Semaphore(0)
    held = engine.held

    def gated():
        gate.acquire()
        return held()

    engine.held = gated
    source, policy = source_of(engine), Weights()
    gate.release(4 * 4 * 2)  # the first two rounds: four rollouts of four tokens
    steps(source, policy, 0, 2)  # its second step begins round 2 to 5; round 2 waits at the gate
    assert engine.loads == [1] and not policy.copies
    gate.release(4 * 2)  # two of four tokens of round 2
    while gate._value:
        time.sleep(0.001)
    with ThreadPoolExecutor(1) as trainer:
        third = trainer.submit(steps, source, policy, 2, 3)  # waits for round 2, which waits at the gate
        while engine.loads == [1]:
            time.sleep(0.001)
        gate.release(1000)
        rows = [rollout for rollout, _ in third.result()[0]]
    assert engine.loads == [1, 2]
    assert {(r.policy_version, r.last_version) for r in rows} == {(1, 2)}
    assert {tuple(r.token_ids[:2]) for r in rows} == {(1, 1)} and {r.token_ids[-1] for r in rows} == {2}
    source.close()
