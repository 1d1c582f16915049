"""Packing loses nothing, mixes nothing, and cannot change the loss."""

import random
from array import array

import numpy as np
import pytest
import torch

from pipeline.train.pack import Example, Micro, assign, mean_weights, pack


def test_every_sequence_is_placed_once_within_the_budget():
    rng = random.Random(0)
    lengths = [rng.randint(1, 64) for _ in range(200)]
    parts = assign(lengths, 256)
    assert sorted(i for part in parts for i in part) == list(range(200))
    totals = [sum(lengths[i] for i in part) for part in parts]
    assert max(totals) <= 256 and len(parts) <= sum(lengths) / 256 + 2
    assert min(totals) > 0.9 * max(totals)  # even


@pytest.mark.parametrize(
    ("lengths", "want"),
    [
        ([], []),
        ([65, 3, 4], [[0], [2, 1]]),  # longer than the budget: by itself
        ([100, 100, 100], [[0], [1], [2]]),
        ([60, 60, 4, 4], [[0, 2], [1, 3]]),
        ([40, 40, 40], [[0], [1], [2]]),  # two bins would do by their sum, but nothing fits in
        ([1] * 5, [[0, 1, 2, 3, 4]]),
    ],
)
def test_micro_batches_by_hand(lengths, want):
    assert assign(lengths, 64) == want


def test_a_micro_batch_lines_up():
    a = Example([5, 6, 7], [0.0, 0.5, 0.5], [0.0, -1.0, -2.0], advantage=2.0)
    b = Example(array("i", [8, 9]), np.array([0.3, 0.7]))
    (micro,) = pack([a, b], 6).micro_batches()
    assert micro.token_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert micro.packed.positions.tolist() == [[0, 1, 2, 0, 1]] and micro.packed.ends.tolist() == [0, 3, 5]
    assert micro.scored.tolist() == [1, 2, 4]  # no weight on a first token
    torch.testing.assert_close(micro.weights, torch.tensor([0.5, 0.5, 0.7]))
    assert micro.rollout_logprobs.tolist() == [-1, -2, 0]
    assert micro.advantages.tolist() == [2, 2, 0] and micro.rollout.tolist() == [0, 0, 1]
    assert pack([a, b], 6).lengths == [3, 2]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_state_that_predicts_a_token_k_further_is_of_its_own_sequence(k):
    rng = random.Random(k)
    sequences = [[10 * i + j for j in range(rng.randint(1, 7))] for i in range(9)]
    weights = [[float(rng.random() < 0.7) for _ in s] for s in sequences]
    micro = Micro.of([Example(s, w) for s, w in zip(sequences, weights, strict=True)])
    states, targets, shares = micro.ahead(k)
    row = micro.token_ids[0].tolist()
    got = [(row[s], t) for s, t in zip(states.tolist(), targets.tolist(), strict=True)]
    pairs = [(s, w) for s, w in zip(sequences, weights, strict=True)]
    assert got == [(s[j - k], s[j]) for s, w in pairs for j in range(k, len(s)) if w[j]]
    assert shares.tolist() == [1.0] * len(got)


def test_mean_weights_sum_to_one():
    first, second = mean_weights([[False, True, True], [True, True]])
    third = float(np.float32(1 / 3))
    assert first.tolist() == [0, third, third] and second.tolist() == [0, third]
    flags = np.ones(3, np.float32)
    mean_weights([flags])
    assert flags.tolist() == [1, 1, 1]  # the caller's own


def test_micro_batches_are_the_batch_the_same_every_time():
    batch = pack([Example([i] * 5, [0.1] * 5) for i in range(7)], 16)
    parts = list(batch.micro_batches())
    assert [p.token_ids.shape for p in parts] == [(1, 15), (1, 10), (1, 10)]
    assert torch.equal(
        torch.cat([p.token_ids for p in parts], 1), torch.cat([p.token_ids for p in batch.micro_batches()], 1)
    )
    assert sorted(torch.cat([p.token_ids for p in parts], 1)[0].tolist()) == sorted(list(range(7)) * 5)
