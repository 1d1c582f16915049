"""Planned batches: equal budgets whatever the lengths, and labels that match a plain loop."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from distill.batches import once, plan

CASES = [
    ((50, 110), 300, 2048),
    ((3, 9), 70, 300),
    ((40, 300), 33, 640),
    ((100, 512), 50, 512),
    ((5, 5), 7, 9),
]


@pytest.mark.parametrize(("span", "micro_batches", "budget"), CASES)
def test_the_budget_is_met_to_within_one_row(span: tuple[int, int], micro_batches: int, budget: int) -> None:
    rng = random.Random(1)
    lengths = [rng.randint(*span) for _ in range(500)]
    batches = plan(lengths, micro_batches, budget, seed=0)
    assert len(batches) == micro_batches
    assert all(batches)
    tokens = sum(lengths[row] for batch in batches for row in batch)
    assert 0 <= tokens - micro_batches * budget < span[1]


def test_every_row_comes_equally_often() -> None:
    lengths = [random.Random(2).randint(5, 40) for _ in range(97)]
    counts = Counter(row for batch in plan(lengths, 60, 200, seed=0) for row in batch)
    assert len(counts) == 97
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_settles_the_order() -> None:
    lengths = list(range(5, 60))
    assert plan(lengths, 20, 200, seed=3) == plan(lengths, 20, 200, seed=3)
    assert plan(lengths, 20, 200, seed=3) != plan(lengths, 20, 200, seed=4)


def test_a_row_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget 10"):
        plan([11], 1, 10, seed=0)


@pytest.mark.parametrize("budget", [40, 100, 10_000])
def test_an_evaluation_sees_every_row_once(budget: int) -> None:
    lengths = [random.Random(4).randint(5, 40) for _ in range(97)]
    batches = once(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(97))
    assert max(sum(lengths[row] for row in batch) for batch in batches) < budget + 40
    assert once([], 100) == []
