"""Attention of packed sequences by every path against float64 loops, values and gradients."""

import inspect
import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import varlen

from model.kernels import attend as dispatch
from model.kernels import blockwise
from model.kernels.attend import attend
from model.kernels.blockwise import BLOCK, BlockwiseAttention
from model.kernels.packed import Packed
from tests.gpu.fake_cuda import fake_cuda

LENGTHS = {
    "one token": (1,),
    "uneven": (5, 1, BLOCK + 1, 1, 2 * BLOCK + 9, 33),
    "of one length": (BLOCK,) * 3,
}
WINDOWS = (None, 1, 7, BLOCK, BLOCK + 30)


def written_out(q, k, v, lengths, scale, window, softcap):
    """Query by query and head by head, over lists of the keys that it sees."""
    out, begin = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype), 0
    for length in lengths:
        for i in range(begin, begin + length):
            first = begin if window is None else max(begin, i - window + 1)
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = scale * (k[first : i + 1, g] @ q[i, h])
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[i, h] = scores.softmax(0) @ v[first : i + 1, g]
        begin += length
    return out


def inputs(tokens, h, g, d, e, dtype=torch.float64):
    """Queries, keys and values that take gradients, and the gradient of the output."""
    torch.manual_seed(0)
    shapes = (tokens, h, d), (tokens, g, d), (tokens, g, e), (tokens, h, e)
    *found, upstream = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in found], upstream


def check(ours, lengths, h=4, g=2, d=8, e=8, window=None, softcap=None, close=1e-11):
    """`ours(q, k, v, scale)` in float64 equals the loops, with all three gradients."""
    x, upstream = inputs(sum(lengths), h, g, d, e)
    scale = 0.9 / math.sqrt(d)
    got, want = ours(*x, scale), written_out(*x, lengths, scale, window, softcap)
    torch.testing.assert_close(got, want, atol=close, rtol=close)
    grads = (torch.autograd.grad(out, x, upstream) for out in (got, want))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=close, rtol=close)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("h", "g", "e"), [(4, 2, 8), (2, 2, 5), (3, 1, 8)], ids=["grouped", "narrow", "one"])
@pytest.mark.parametrize("case", LENGTHS)
def test_blocks_of_queries(case, h, g, e, window, softcap):
    lengths = LENGTHS[case]
    check(
        lambda q, k, v, scale: BlockwiseAttention.apply(q, k, v, lengths, scale, window, softcap),
        *(lengths, h, g, 8, e, window, softcap),
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7, 1000])
@pytest.mark.parametrize(("h", "g", "e"), [(4, 2, 8), (2, 2, 5)], ids=["grouped", "narrow"])
@pytest.mark.parametrize("blocks", [range(0), range(1 << 20)], ids=["fused", "in blocks"])
@pytest.mark.parametrize("case", LENGTHS)
def test_what_a_cpu_chooses(case, blocks, h, g, e, window, softcap, monkeypatch):
    monkeypatch.setattr(dispatch, "CPU_BLOCKS", blocks)
    packed = Packed.of(LENGTHS[case])
    check(
        lambda q, k, v, scale: attend(q, k, v, packed, scale, window, softcap),
        *(packed.lengths, h, g, 8, e, window, softcap),
    )


@pytest.mark.parametrize(("length", "fused"), [(1, True), (200, False), (1500, True)])
def test_a_cpu_takes_its_kernel_by_length(length, fused, monkeypatch):
    taken = []
    monkeypatch.setattr(dispatch, "_each", lambda *_: taken.append("fused"))
    (q, k, v), _ = inputs(length, 1, 1, 4, 4)
    attend(q, k, v, Packed.of([length]), 1.0)
    assert bool(taken) is fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_in_narrow_types_round_as_their_type(dtype):
    lengths = LENGTHS["uneven"]
    x, upstream = inputs(sum(lengths), 4, 2, 16, 16, dtype)
    exact = [y.detach().double().requires_grad_() for y in x]
    got = BlockwiseAttention.apply(*x, lengths, 0.25, None, None)
    want = written_out(*exact, lengths, 0.25, None, None)
    most = 8 * torch.finfo(dtype).eps
    for mine, theirs in zip(
        (got, *torch.autograd.grad(got, x, upstream)),
        (want, *torch.autograd.grad(want, exact, upstream.double())),
        strict=True,
    ):
        assert mine.dtype == dtype and (mine - theirs).norm() < most * theirs.norm()


def test_keys_behind_the_window_cost_nothing(monkeypatch):
    """The number of scores of 40 blocks: each query block and its window, not all that came before."""
    scores = []
    keep = blockwise._probabilities

    def counted(*args):
        p, capped = keep(*args)
        scores.append(p.numel())
        return p, capped

    monkeypatch.setattr(blockwise, "_probabilities", counted)
    (q, k, v), _ = inputs(40 * BLOCK, 2, 1, 4, 4)
    BlockwiseAttention.apply(q, k, v, (40 * BLOCK,), 1.0, 10, None)
    assert max(scores) == 2 * BLOCK * (BLOCK + 9) and len(scores) == 40


@pytest.mark.parametrize("window", [16, 512, 1 << 15])
def test_scores_of_a_block_are_bounded_on_a_gpu_whatever_the_window(window):
    queries = torch.empty(2, 4, 1 << 15, 8, device="meta")
    for rows, keys in blockwise._blocks(queries, window):
        assert 8 * (rows.stop - rows.start) * (keys.stop - keys.start) <= 2 * blockwise.SCORES


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_kernel_is_forbidden_to_a_thread_that_generates_meanwhile(device, monkeypatch):
    """What `sdpa_kernel` sets holds for all threads."""
    kernel, allowed = dispatch.F.scaled_dot_product_attention, []

    def watched(*args, **options):
        cuda = torch.backends.cuda
        allowed.append((cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.flash_sdp_enabled()))
        return kernel(*args, **options)

    with fake_cuda() if device == "cuda" else nullcontext():
        q, k, v = (torch.randn(8, 2, 4).to(device) for _ in range(3))
        monkeypatch.setattr(dispatch.F, "scaled_dot_product_attention", watched)
        attend(q, k, v, Packed.of((8,), device), 1.0)
    assert allowed == [(True, True, True)]


@pytest.mark.parametrize("grouped", [True, False], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("d", "e"), [(8, 8), (12, 8), (8, 5)])
def test_varlen_is_told_what_a_gpu_kernel_needs(d, e, window, grouped, monkeypatch):
    """The kernel runs on GPUs alone: in its place the loops, with its limits and its meaning of a window."""
    packed = Packed.of(LENGTHS["uneven"])

    def kernel(q, k, v, ends_q, ends_k, most_q, most_k, *, scale, window_size, enable_gqa=False):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        assert ends_q is ends_k is packed.ends and most_q == most_k == packed.longest
        assert window_size[1] == 0 and (enable_gqa or k.shape[1] == q.shape[1])
        seen = None if window_size[0] < 0 else window_size[0] + 1
        return written_out(q, k, v, packed.lengths, scale, seen, None)

    monkeypatch.setattr(dispatch, "varlen_attn", kernel)
    monkeypatch.setattr(dispatch, "GROUPED", {"enable_gqa": True} if grouped else {})
    check(
        lambda q, k, v, scale: dispatch._varlen(q, k, v, packed, scale, window),
        *(packed.lengths, 4, 2, d, e, window),
    )


def test_varlen_takes_these_arguments_in_the_installed_torch():
    known = inspect.signature(varlen.varlen_attn).parameters
    assert list(known)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(known) and set(dispatch.GROUPED) <= set(known)
