"""Kernels that a GPU has and a CPU lacks, so that autograd keeps the same tensors on the fake GPU.

`torch.nn.attention.varlen` runs a sequence at a time with complete scores. It refuses what the kernel does.
RMSNorm is a kernel there; on a CPU torch composes it of operators that each keep something. What Triton
computes there is written out.

Axes    t tokens of all sequences, h heads of queries, g of keys and values, d head size or width, n sequences
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 256
"""Largest head size of the kernel."""


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_key: int,
    causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (t h d), log of the scores' sums (h t) and the state of a generator that is not used."""
    _check(q, k, v, ends, key_ends, longest, longest_key)
    out, sums = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float)
    for begin, end in _sequences(ends):
        scores = _scores(q[begin:end], k[begin:end], scale, window, causal)
        sums[:, begin:end] = scores.logsumexp(-1)
        values = _repeated(v[begin:end], q.shape[1])
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float()).to(q.dtype)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_key: int,
    causal: bool,
    state: Tensor,
    scale: float | None = None,
    window: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    _check(q, k, v, ends, key_ends, longest, longest_key)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for begin, end in _sequences(ends):
        queries, do, o = (x[begin:end].float() for x in (q, grad, out))
        keys, values = (_repeated(x[begin:end].float(), q.shape[1]) for x in (k, v))
        p = _scores(q[begin:end], k[begin:end], scale, window, causal).softmax(-1)
        ds = p * (torch.einsum("qhd,khd->hqk", do, values) - (do * o).sum(-1).T[..., None])
        ds *= scale or 1 / math.sqrt(q.shape[-1])
        dq[begin:end] = torch.einsum("hqk,khd->qhd", ds, keys)
        for d, product in ((dk, torch.einsum("hqk,qhd->khd", ds, queries)),
                           (dv, torch.einsum("hqk,qhd->khd", p, do))):  # fmt: skip
            d[begin:end] = product.unflatten(1, (d.shape[1], -1)).sum(2)
    return dq, dk, dv


class FusedNorm(torch.autograd.Function):
    """`F.rms_norm` of `x` (.. d) by one kernel each way; it keeps `x`, the weight and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, r)
        return (x.float() * r * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        normed, d = x.float() * r, dy.float() * weight.float()
        dx = r * (d - normed * (d * normed).mean(-1, keepdim=True))
        dw = (dy.float() * normed).flatten(0, -2).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None


def log_softmax_rows(z: Any, targets: Any, rows: Any, times: float, entropy: bool) -> Any:
    """As `model.kernels.fused` has it, of tensors on the fake GPU, whose memory no intermediate takes."""
    logits = z.elem.float() * times
    most, log_p = logits.amax(1), logits.log_softmax(1)
    rows.elem[0] = log_p.gather(1, targets.elem[:, None])[:, 0]
    if entropy:
        rows.elem[1] = -(log_p.exp() * log_p).sum(1)
    rows.elem[2], rows.elem[3] = most, (logits - most[:, None]).exp().sum(1).log()
    return z


def logits_gradient(
    z: Any,
    targets: Any,
    rows: Any,
    d: Any,
    e: Any,
    dtype: torch.dtype,
    times: float,
    rate: float,
    uncap: float,
) -> Any:
    """As `log_softmax_rows`."""
    out, logits = z if z.dtype == dtype else torch.empty_like(z, dtype=dtype), z.elem.float() * times
    log_p = logits - rows.elem[2:].sum(0)[:, None]
    one = F.one_hot(targets.elem, logits.shape[1])
    dz = d.elem[:, None] * (one - log_p.exp())
    if e is not None:
        dz -= e.elem[:, None] * log_p.exp() * (log_p + rows.elem[1, :, None])
    out.elem.copy_(dz * rate * (1 - (uncap * logits).square()))
    return out


def _sequences(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(ends.tolist()))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, scale: float | None, window: list[int] | None, causal: bool) -> Tensor:
    """Scaled scores (h t t) of one sequence in fp32, -inf where a query does not see a key."""
    left, right = window or (-1, -1)
    right = 0 if causal else right
    keys = _repeated(k, q.shape[1]).float()
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * (scale or 1 / math.sqrt(q.shape[-1]))
    ahead = torch.arange(len(k))[None] - torch.arange(len(q))[:, None]  # how far behind its query a key lies
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= (ahead > right) if right >= 0 else hidden
    hidden |= (ahead < -left) if left >= 0 else hidden
    return scores.masked_fill(hidden, -torch.inf)


def _check(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_key: int
) -> None:
    """Raise as the kernel does."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not q.shape[-1] == k.shape[-1] == v.shape[-1] <= MOST or q.shape[-1] % 8:
        raise RuntimeError(f"FlashAttention head sizes {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]}")
    if ends.dtype != torch.int32 or key_ends.dtype != torch.int32:
        raise RuntimeError("cu_seqlens must have dtype int32")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    lengths = ends.diff()
    if int(ends[-1]) != len(q) or int(lengths.max()) > min(longest, longest_key):
        raise RuntimeError(f"sequences of {lengths.tolist()} in {len(q)} tokens, longest {longest}")
