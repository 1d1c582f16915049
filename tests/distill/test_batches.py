"""Planned batches: equal budgets whatever the lengths, and labels that match a plain loop."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from distill.batches import IGNORE, Example, collate, plan

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


def test_only_completions_have_labels() -> None:
    batch = collate([Example([7, 8], [9, 2]), Example([7], [5, 6, 4, 2])], pad_id=0)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 2, 0], [7, 5, 6, 4, 2]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 9, 2, IGNORE], [IGNORE, 5, 6, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
