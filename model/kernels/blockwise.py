"""Causal attention in blocks of queries, a sequence at a time: with a window, a soft cap, values of any size.

    S = scale Q_b K^T, capped as c tanh(S / c)         P = softmax S         O_b = P V

    dV += P^T dO_b    dS = softmax'(dO_b V^T, P) (1 - (S / c)^2)    dQ_b = scale dS K    dK += scale dS^T Q_b

Scores of one block exist at a time, and the backward computes them again. Keys above the diagonal or behind
the window of the whole block are skipped, so with a window w the cost of s tokens grows as s * w. Query heads
that share a key head are further rows of a block: keys and values are never repeated. Plain batched products,
so for any device and type.

Axes    s tokens of all sequences, L of one; h query heads, g key heads, r = h / g; d and e sizes of a key and
        of a value; B queries of a block, T keys
"""

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Queries of a block on a CPU, where its scores should stay in the cache."""
SCORES = 1 << 25
"""Scores of a block elsewhere, up to twice as many, unless BLOCK queries have more: each costs launches."""


class BlockwiseAttention(torch.autograd.Function):
    """softmax(softcap(scale q k^T)) v in each of the sequences that lie end to end.

    Args of `apply`:
        q, k, v: `s h d`, `s g d`, `s g e`.
        lengths: tokens of each sequence.
        scale: of the scores.
        window: keys that a query sees, its own included; None = all of its sequence so far.
        softcap: c; None = scores as they are.

    Returns:
        `s h e`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.how = lengths, (scale, window or max(lengths, default=1), softcap)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for o, *parts in zip(*(x.split(lengths) for x in (out, q, k, v)), strict=True):
            qs, ks, vs = (_heads_first(x, k.shape[1]) for x in parts)
            os = qs.new_empty(*qs.shape[:-1], v.shape[-1])
            for rows, keys in _blocks(qs, ctx.how[1]):
                p, _ = _probabilities(qs, ks, rows, keys, *ctx.how)
                os[:, :, rows] = torch.bmm(p, vs[:, 0, keys]).unflatten(1, (qs.shape[1], -1))
            _put(o, os)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        g, (scale, _, softcap) = inputs[1].shape[1], ctx.how
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        for parts in zip(*(x.split(ctx.lengths) for x in (grad, *inputs, *found)), strict=True):
            do, qs, ks, vs = (_heads_first(x, g) for x in parts[:4])
            # Sums over blocks: in bf16 they would lose what a small block adds.
            wide = torch.promote_types(grad.dtype, torch.float32)
            dqs, dks, dvs = torch.empty_like(qs), *(torch.zeros_like(x, dtype=wide) for x in (ks, vs))
            for rows, keys in _blocks(qs, ctx.how[1]):
                p, capped = _probabilities(qs, ks, rows, keys, *ctx.how)
                d = do[:, :, rows].flatten(1, 2)
                dvs[:, 0, keys] += torch.bmm(p.transpose(1, 2), d)
                ds = torch.bmm(d, vs[:, 0, keys].transpose(1, 2))
                ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
                if capped is not None:
                    ds.mul_(1 - (capped / softcap).square_())
                dqs[:, :, rows] = scaled_bmm(ds, ks[:, 0, keys], scale).unflatten(1, (qs.shape[1], -1))
                dks[:, 0, keys] += scaled_bmm(ds.transpose(1, 2), qs[:, :, rows].flatten(1, 2), scale)
            for x, value in zip(parts[4:], (dqs, dks, dvs), strict=True):
                _put(x, value)
        return *found, None, None, None, None


def _heads_first(x: Tensor, g: int) -> Tensor:
    """A copy of `x` (L h d): (g r L d)."""
    return x.unflatten(1, (g, -1)).permute(1, 2, 0, 3).contiguous()


def _put(x: Tensor, value: Tensor) -> None:
    """Write `value` (g r L d) into `x` (L h d)."""
    x.unflatten(1, value.shape[:2]).copy_(value.permute(2, 0, 1, 3))


def _blocks(q: Tensor, window: int) -> Iterator[tuple[slice, slice]]:
    """Queries of each block of `q` (g r L d), and the keys that any of them sees."""
    heads, length = q.shape[0] * q.shape[1], q.shape[2]
    most = SCORES // heads  # queries times keys, of which a block has its own and the window before it
    size = BLOCK if q.device.type == "cpu" else max(BLOCK, min(most // min(length, window), isqrt(most)))
    for begin in range(0, length, size):
        end = min(begin + size, length)
        yield slice(begin, end), slice(max(0, begin - window + 1), end)


def _probabilities(
    q: Tensor, k: Tensor, rows: slice, keys: slice, scale: float, window: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Of queries `rows` over `keys`: (g, r B, T); and their capped scores, which `softcap` needs."""
    s = scaled_bmm(q[:, :, rows].flatten(1, 2), k[:, 0, keys].transpose(1, 2), scale)
    capped = None
    if softcap is not None:
        capped = s.div_(softcap).tanh_().mul_(softcap)
        s = capped.clone()
    by_head, size = s.unflatten(1, (q.shape[1], -1)), rows.stop - rows.start  # g r B T
    by_head[..., rows.start - keys.start :].add_(above(size, s.dtype, s.device))
    behind = rows.stop - window - keys.start
    if behind > 0:
        by_head[..., :behind].add_(_below(size, behind, rows.start - window - keys.start, s.dtype, s.device))
    return s.softmax(-1), capped


def scaled_bmm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """`alpha` times the batched product of `a` (n i j) and `b` (n j k): (n i k)."""
    return torch.baddbmm(a.new_empty(()).expand(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=alpha)


@lru_cache(maxsize=64)
def above(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity above the diagonal (n n): keys that come later. Adding it is cheaper than filling."""
    return torch.full((n, n), float("-inf"), dtype=dtype, device=device).triu(1)


@lru_cache(maxsize=64)
def _below(n: int, m: int, diagonal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity on and below a diagonal (n m): keys that are behind a query's window."""
    return torch.full((n, m), float("-inf"), dtype=dtype, device=device).tril(diagonal)
