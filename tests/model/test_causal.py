"""Block-wise causal attention against plain softmax, forward and backward, for lengths around every limit."""

import pytest
import torch

from model import causal
from model.causal import BLOCK, FULLNESS, CausalAttention, buckets


def plain(q, k, v, scale, sequence_ids):
    """Softmax over the earlier tokens of the same sequence, all tokens at once; padding gives zeros."""
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


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_are_those_of_plain_softmax(case, again, monkeypatch):
    if again:
        monkeypatch.setattr(causal, "KEEP", 0)
    ids, g = CASES[case], torch.Generator().manual_seed(0)
    shapes = ((ids.numel(), 2, 6), (ids.numel(), 2, 6), (ids.numel(), 2, 5))
    tensors = [
        torch.randn(shape, generator=g, dtype=torch.float64).mul_(2).requires_grad_() for shape in shapes
    ]
    ours, want = CausalAttention.apply(*tensors, 0.7, buckets(ids)), plain(*tensors, 0.7, ids)
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(want.shape, generator=g, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(ours, tensors, upstream),
        torch.autograd.grad(want, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_buckets_hold_every_token_once_and_like_lengths():
    ids = CASES["ragged"]
    plan = [bucket.places for bucket in buckets(ids)]
    places = torch.cat([bucket[bucket >= 0] for bucket in plan]).sort().values
    assert torch.equal(places, (ids.flatten() >= 0).nonzero().squeeze(1))
    assert len(plan) > 2  # lengths from 1 to 70 do not share one
    for bucket in plan:
        assert (bucket >= 0).sum(1).min() >= FULLNESS * bucket.shape[1]


def test_bf16_is_near_fp64():
    ids, g = CASES["several blocks"], torch.Generator().manual_seed(1)
    wide = [torch.randn(ids.numel(), 4, d, generator=g, dtype=torch.float64) for d in (48, 48, 32)]
    narrow = [x.bfloat16().requires_grad_() for x in wide]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    ours, want = (CausalAttention.apply(*x, 48**-0.5, buckets(ids)) for x in (narrow, wide))
    assert ours.dtype == torch.bfloat16
    assert (ours - want).norm() < 0.01 * want.norm()
    for x in (ours, want):
        x.double().square().sum().backward()
    for a, b in zip(narrow, wide, strict=True):
        assert (a.grad - b.grad).norm() < 0.02 * b.grad.norm()
