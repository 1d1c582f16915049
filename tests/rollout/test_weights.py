"""The fingerprint of weights: blind to layout, not to a single bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rollout.weights import CHUNK, fingerprint, live_fingerprint

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layout_does_not_count(dtype):
    x = X.to(dtype)
    want = fingerprint([x])
    assert fingerprint([x.T]) == fingerprint([x.flip(0)]) == want
    assert fingerprint([x[:2], x[2:]]) == want  # fused or apart
    assert fingerprint([nn.functional.pad(x, (0, 3, 0, 5))]) == want
    assert 0 <= want < 1 << 64 and fingerprint([torch.zeros(9, dtype=dtype)]) == 0


def test_every_bit_counts():
    want, bits = fingerprint([X]), X.view(torch.int32)
    seen = {want}
    for bit in range(31):
        changed = bits.clone()
        changed[2, 3] ^= 1 << bit
        seen.add(fingerprint([changed.view(torch.float32)]))
    assert len(seen) == 32
    traded = bits.clone()  # one up, one down: a plain sum would not notice
    traded[0, 0] += 1
    traded[0, 1] -= 1
    assert fingerprint([traded.view(torch.float32)]) != want


def test_tensors_longer_than_a_chunk_count_to_their_end():
    long = torch.ones(CHUNK + 3)
    assert fingerprint([long]) == (CHUNK + 3) * fingerprint([torch.ones(1)]) % (1 << 64)
    long[-1] = 2
    assert fingerprint([long]) != fingerprint([torch.ones(CHUNK + 3)])


def test_packed_matrices_and_latent_parts_stand_for_the_complete_matrix():
    """A packed matrix counts as it was before packing; parts cut from kv_b_proj must add up to it."""
    network = nn.Module()
    network.kv_b_proj, network.cut = nn.Linear(8, 6, bias=False), nn.Module()
    network.kv_b_proj.weight = nn.Parameter(torch.zeros(0))
    network.kv_b_proj.r1_packed = fingerprint([X])
    network.cut.W_UK_T, network.cut.W_UV = nn.Parameter(X[:2].clone()), nn.Parameter(X[2:].T.clone())
    assert live_fingerprint(network) == fingerprint([X])
    with torch.no_grad():
        network.cut.W_UV[0, 0] += 1
    assert live_fingerprint(network) != fingerprint([X])
