"""The order of problems: once an epoch, settled ones rarely, the same after a restart."""

from __future__ import annotations

import random
from collections import Counter

from pipeline.data.pool import Order
from pipeline.data.problems import order
from rollout.types import Graded, Problem, Prompt, Rollout

IDS = [f"p{i}" for i in range(10)]


def group(name: str, *rewards: float | None) -> list[Graded]:
    """Graded rollouts of one problem; None where the verifier failed."""
    prompt = Prompt(Problem(name, "math", "?"), "raw", (1,))
    rollouts = [Rollout(prompt, 0, i, [1], [0.0], "stop") for i in range(len(rewards))]
    return [
        Graded(r, "", reward=x or 0.0, verdict="error" if x is None else "correct")
        for r, x in zip(rollouts, rewards, strict=True)
    ]


def test_without_a_curriculum_every_epoch_is_its_own_shuffle_whatever_was_seen() -> None:
    problems = Order(IDS, seed=3)
    problems.saw(group("p1", 1, 1))
    want = [i for epoch in range(3) for i in order(10, 3, epoch)]
    assert [problems.at(place) for place in range(30)] == want
    assert [problems.at(place) for place in (4, 17, 3)] == [want[4], want[17], want[3]]
    assert Order(IDS, seed=3).at(25) == want[25], "a checkpoint of an earlier version has no order in it"


def test_the_order_of_the_file() -> None:
    problems = Order(IDS, seed=3, shuffled=False)
    assert [problems.at(place) for place in range(13)] == [*range(10), 0, 1, 2]


def test_settled_problems_are_left_out_of_later_epochs_until_they_spread_again() -> None:
    problems = Order(IDS, seed=0, again=0.0)
    for name in ("p1", "p2", "p3"):
        problems.saw(group(name, 0.5, 0.5))
    problems.saw(
        group("p2", 0, 1) + group("p4", None, None) + group("p5", None, 1, 0) + group("p3", None, None)
    )
    assert problems.settled == {"p1", "p3"}
    assert sorted(problems.at(place) for place in range(10)) == list(range(10)), "the epoch had begun"
    assert [problems.at(place) for place in range(10, 18)] == [i for i in order(10, 0, 1) if i not in (1, 3)]
    assert problems.at(18) in range(10) and problems.epoch == 2


def test_where_all_are_settled_all_come() -> None:
    problems = Order(IDS, seed=0, again=0.0)
    for name in IDS:
        problems.saw(group(name, 1, 1))
    assert [problems.at(place) for place in range(20)] == [i for epoch in (0, 1) for i in order(10, 0, epoch)]


def test_settled_problems_come_again_in_their_share_of_the_epochs() -> None:
    problems, place, seen = Order(IDS, seed=1, again=0.25), 0, Counter[int]()
    problems.saw(group("p7", 1, 1))
    while problems.epoch < 1_000:
        seen[problems.at(place)] += 1
        place += 1
    assert all(abs(seen[i] - (250 if i == 7 else 1_000)) < 50 for i in range(10)), seen


def test_a_restart_goes_on_with_the_same_problems() -> None:
    rng, problems = random.Random(0), Order(IDS, seed=5, again=0.3)
    for place in range(57):
        problems.saw(group(IDS[problems.at(place)], 1, rng.choice([0, 1])))
    state = problems.state_dict()
    other = Order(IDS, seed=5, again=0.3)
    other.load_state_dict(state)
    problems.saw(group("p0", 0, 0))
    other.saw(group("p0", 0, 0))
    assert [problems.at(place) for place in range(57, 120)] == [other.at(place) for place in range(57, 120)]
