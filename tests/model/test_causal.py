"""Block-wise causal attention against plain softmax, forward and backward, for lengths around every limit."""

from dataclasses import replace

import pytest
import torch

from model import TINY
from model.kernels.cpu import attention as causal
from model.kernels.cpu.attention import BLOCK, FULLNESS, CausalAttention, buckets
from model.rope import Rope


def plain(q, kv, k_rot, turns, rope, scale, sequence_ids):
    """Softmax over the earlier tokens of the same sequence, all tokens at once; padding gives zeros."""
    n = q.shape[-1] - k_rot.shape[-1]
    q = torch.cat([q[..., :n], rope.rotate(q[..., n:], turns[:, None])], dim=-1)
    k = torch.cat([kv[..., :n], k_rot[:, None].expand(-1, q.shape[1], -1)], dim=-1)
    v = kv[..., n:]
    ids = sequence_ids.flatten()
    rows = torch.arange(len(sequence_ids)).repeat_interleave(sequence_ids.shape[1])
    seen = ((ids[:, None] == ids) & (rows[:, None] == rows)).tril()
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    o = torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    return o * (ids >= 0)[:, None, None]


def rows(*lengths, width):
    """One packed row: the sequences, then padding."""
    ids = torch.full((width,), -1)
    start = 0
    for number, length in enumerate(lengths):
        ids[start : start + length] = number
        start += length
    return ids


CASES = {
    "one short": torch.stack([rows(5, width=5)]),
    "a block and one more": torch.stack([rows(BLOCK + 1, width=BLOCK + 1)]),
    "several blocks": torch.stack([rows(3 * BLOCK - 7, 20, width=4 * BLOCK)]),
    "ragged": torch.stack([rows(70, 60, 1, 9, width=150), rows(64, 33, 2, width=150), rows(width=150)]),
    "interleaved": torch.tensor([[0, 1, 0, 1, 1, -1, 0]]),
}


def inputs(tokens, h, n, r, v, seed):
    """Queries (N h n+r), keys and values (N h n+v), rotated keys (N r) and rotations (N r/2)."""
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, h, n + r), (tokens, h, n + v), (tokens, r)
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    angles = torch.randn(tokens, r // 2, generator=g)
    return tensors, torch.polar(torch.full_like(angles, 1.5), angles)


def rope(interleave=True):
    """A rope of any size: only its order of dimensions counts."""
    return Rope(replace(TINY, rope_interleave=interleave))


@pytest.mark.parametrize("interleave", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("h", [1, 2])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_are_those_of_plain_softmax(case, again, h, interleave, monkeypatch):
    if again:
        monkeypatch.setattr(causal, "KEEP", 0)
    ids, turning = CASES[case], rope(interleave)
    tensors, turns = inputs(ids.numel(), h, 4, 4, 5, seed=0)
    tensors = [x.mul_(2).requires_grad_() for x in tensors]
    before = [x.detach().clone() for x in tensors]
    ours = CausalAttention.apply(*tensors, turns, turning, 0.7, buckets(ids))
    want = plain(*tensors, turns, turning, 0.7, ids)
    assert all(map(torch.equal, tensors, before))  # rotated in a copy
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(ours, tensors, upstream),
        torch.autograd.grad(want, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_buckets_hold_every_token_once_and_like_lengths():
    ids = CASES["ragged"]
    plan = [bucket.indices for bucket in buckets(ids)]
    indices = torch.cat([bucket[bucket >= 0] for bucket in plan]).sort().values
    assert torch.equal(indices, (ids.flatten() >= 0).nonzero().squeeze(1))
    assert len(plan) > 2  # lengths from 1 to 70 do not share one
    for bucket in plan:
        assert (bucket >= 0).sum(1).min() >= FULLNESS * bucket.shape[1]


def test_bf16_is_near_fp64():
    ids, turning = CASES["several blocks"], rope()
    wide, turns = inputs(ids.numel(), 4, 32, 16, 32, seed=1)
    narrow = [x.bfloat16().requires_grad_() for x in wide]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    ours, want = (CausalAttention.apply(*x, turns, turning, 48**-0.5, buckets(ids)) for x in (narrow, wide))
    assert ours.dtype == torch.bfloat16
    assert (ours - want).norm() < 0.01 * want.norm()
    for x in (ours, want):
        x.double().square().sum().backward()
    for a, b in zip(narrow, wide, strict=True):
        assert (a.grad - b.grad).norm() < 0.02 * b.grad.norm()
