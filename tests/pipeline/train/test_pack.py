"""Packing loses nothing, mixes nothing, and cannot change the loss."""

import random

import pytest
import torch

from pipeline.errors import UserError
from pipeline.train.pack import PADDING, Example, assign_rows, mean_weights, pack


def test_every_sequence_is_placed_once_within_its_row():
    rng = random.Random(0)
    lengths = [rng.randint(1, 64) for _ in range(200)]
    rows = assign_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.25 * sum(lengths) / 64


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match="raise row_tokens"):
        assign_rows([65], 64)


def test_packed_arrays_line_up():
    a = Example([5, 6, 7], [0.0, 0.5, 0.5], [0.0, -1.0, -2.0], advantage=2.0)
    b = Example([8, 9], [0.3, 0.7])
    batch = pack([a, b], 6)
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.sequence_ids.tolist() == [[0, 0, 0, 1, 1, PADDING]]
    torch.testing.assert_close(
        batch.weights, torch.tensor([[0, 0.5, 0.5, 0, 0.7, 0]])
    )  # no weight on a first token
    assert batch.rollout_logprobs.tolist() == [[0, -1, -2, 0, 0, 0]]
    assert batch.advantages.tolist() == [[2, 2, 2, 0, 0, 0]]
    assert batch.scored.tolist() == [[True, True, False, True, False]]
    assert batch.tokens() == 5


def test_mean_weights_sum_to_one():
    weights = mean_weights([[False, True, True], [True, True]])
    assert weights == [[0, 1 / 3, 1 / 3], [0, 1 / 3]]


def test_micro_batches_are_the_batch():
    batch = pack([Example([i] * 5, [0.1] * 5) for i in range(7)], 5)
    parts = list(batch.micro_batches(3))
    assert [p.token_ids.shape[0] for p in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([p.token_ids for p in parts]), batch.token_ids)
