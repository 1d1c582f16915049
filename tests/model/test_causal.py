"""Block-wise causal attention against plain softmax, forward and backward, for lengths around every limit."""

from dataclasses import replace

import pytest
import torch

from model import TINY
from model.kernels.cpu import attention as causal
from model.kernels.cpu.attention import BLOCK, FULLNESS, CausalAttention, buckets
from model.rope import Rope


def plain(q, kv, k_rot, turns, rope, scale, lengths):
    """Softmax over the earlier tokens of the same sequence, all tokens at once."""
    n = q.shape[-1] - k_rot.shape[-1]
    q = torch.cat([q[..., :n], rope.rotate(q[..., n:], turns[:, None])], dim=-1)
    k = torch.cat([kv[..., :n], k_rot[:, None].expand(-1, q.shape[1], -1)], dim=-1)
    v = kv[..., n:]
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (ids[:, None] == ids).tril()
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


CASES = {
    "one short": [5],
    "a block and one more": [BLOCK + 1],
    "several blocks": [3 * BLOCK - 7, 20],
    "ragged": [70, 60, 1, 9, 64, 33, 2],
    "equal": [8, 8, 8],
    "equal, but apart": [8, 30, 8],
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
    lengths, turning = CASES[case], rope(interleave)
    tensors, turns = inputs(sum(lengths), h, 4, 4, 5, seed=0)
    tensors = [x.mul_(2).requires_grad_() for x in tensors]
    before = [x.detach().clone() for x in tensors]
    ours = CausalAttention.apply(*tensors, turns, turning, 0.7, buckets(lengths))
    want = plain(*tensors, turns, turning, 0.7, lengths)
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
    lengths = CASES["ragged"]
    plan = [bucket.indices for bucket in buckets(lengths)]
    indices = torch.cat([bucket[bucket >= 0] for bucket in plan]).sort().values
    assert torch.equal(indices, torch.arange(sum(lengths)))
    assert len(plan) > 2  # lengths from 1 to 70 do not share one
    for bucket in plan:
        assert (bucket >= 0).sum(1).min() >= FULLNESS * bucket.shape[1]


def test_a_bucket_of_neighbours_of_one_length_is_a_run():
    runs = [bucket.run for case in ("equal", "equal, but apart") for bucket in buckets(CASES[case])]
    assert runs == [slice(0, 24), slice(8, 38), None]


def test_bf16_is_near_fp64():
    lengths, turning = CASES["several blocks"], rope()
    wide, turns = inputs(sum(lengths), 4, 32, 16, 32, seed=1)
    narrow = [x.bfloat16().requires_grad_() for x in wide]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    ours, want = (
        CausalAttention.apply(*x, turns, turning, 48**-0.5, buckets(lengths)) for x in (narrow, wide)
    )
    assert ours.dtype == torch.bfloat16
    assert (ours - want).norm() < 0.01 * want.norm()
    for x in (ours, want):
        x.double().square().sum().backward()
    for a, b in zip(narrow, wide, strict=True):
        assert (a.grad - b.grad).norm() < 0.02 * b.grad.norm()
