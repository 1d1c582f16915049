"""The fingerprint of weights: blind to layout, not to a single bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rollout.weights import CHUNK, LATENT, fingerprint, live_fingerprints, over_ranks

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
    for dtype in (torch.float32, torch.bfloat16, torch.int8):  # few values are counted, many are hashed
        n = CHUNK["cpu"] + 3
        long = torch.ones(n, dtype=dtype)
        assert fingerprint([long]) == n * fingerprint([torch.ones(1, dtype=dtype)]) % (1 << 64)
        long[-1] = 2
        assert fingerprint([long]) != fingerprint([torch.ones(n, dtype=dtype)])


def hash_by_hand(bits: int) -> int:
    """SplitMix64's finalizer with Python's integers and an arithmetic shift."""

    def signed(x: int) -> int:
        return (x + (1 << 63)) % (1 << 64) - (1 << 63)

    x = signed(bits * -0x61C8864680B583EB)
    x = signed((x ^ (x >> 30)) * -0x40A7B892E31B1A47)
    return x ^ (x >> 27)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_hash_is_the_published_one_for_every_size(dtype):
    values = torch.tensor([0, 1, -1, 5, -100, 127], dtype=dtype)
    want = sum(hash_by_hand(int(v)) for v in values) % (1 << 64)
    many = values.repeat(20_000)  # long enough to be counted
    assert fingerprint([values]) == want and fingerprint([many]) == want * 20_000 % (1 << 64)
    assert fingerprint([values.view(torch.uint8).view(dtype)]) == want


def test_an_fp8_tensor_has_a_fingerprint():
    x = X.to(torch.float8_e4m3fn)
    assert fingerprint([x]) == fingerprint([x.view(torch.int8)]) != fingerprint([(2 * X).to(x.dtype)])


def test_ranks_of_an_engine_add_up_and_replicas_count_once():
    """Columns and rows over two ranks, a norm on both: the complete model's sum."""

    def rank(index: int) -> dict[str, int]:
        net = nn.Module()
        net.column, net.row, net.norm = (nn.Linear(1, 1, bias=False) for _ in range(3))
        net.column.weight = nn.Parameter(X.chunk(2)[index].clone())
        net.row.weight = nn.Parameter(X.T.chunk(2)[index].clone() * 3)
        net.norm.weight = nn.Parameter(X[0].clone())
        return live_fingerprints(net)

    want = fingerprint([X, 3 * X, X[0]])
    found = [rank(0), rank(1)]
    assert over_ranks(found) == want and over_ranks([found[0]]) != want
    found[1]["norm.weight"] += 1  # a stale replica
    assert over_ranks(found) != want


def test_packed_matrices_and_latent_parts_stand_for_the_complete_matrix():
    """A packed matrix counts as it was before packing; parts cut from kv_b_proj must add up to it."""
    network = nn.Module()
    network.kv_b_proj, network.cut = nn.Linear(8, 6, bias=False), nn.Module()
    network.kv_b_proj.weight = nn.Parameter(torch.zeros(0))
    network.kv_b_proj.r1_packed = fingerprint([X])
    network.cut.W_UK_T, network.cut.W_UV = nn.Parameter(X[:2].clone()), nn.Parameter(X[2:].T.clone())
    found = live_fingerprints(network)
    assert found == {"kv_b_proj.weight": fingerprint([X]), LATENT: 0}
    assert over_ranks([found]) == over_ranks([found, found]) == fingerprint([X])
    with torch.no_grad():
        network.cut.W_UV[0, 0] += 1
    assert over_ranks([live_fingerprints(network)]) != fingerprint([X])
