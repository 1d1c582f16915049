"""Causal attention over sequences of many lengths, for CPUs: no block above the diagonal.

The fused attention of torch needs heads of one size and, on a CPU, is slower than plain GEMMs at the lengths
that a CPU trains. Here queries are taken a block at a time against the keys up to the block's end:

    P_b = softmax(scale Q_b K_(<=b)^T)        O_b = P_b V_(<=b)

    dV += P_b^T dO_b      dS_b = softmax'(dO_b V^T, P_b)      dQ_b = scale dS_b K      dK += scale dS_b^T Q_b

A packed row is taken apart into its sequences, and short sequences of like length share a bucket, padded on
the right: a causal query never sees padding behind it, so there is no mask but the diagonal block's. A bucket
is small, so that what its products hand to each other stays in the core's cache.

Axes    N tokens of the row, h heads, n unrotated and r rotated query dimensions, v value
        dimensions; of a bucket: n sequences, L its longest
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.kernels.blockwise import above, scaled_bmm
from model.rope import Rope

BLOCK = 64
"""Queries of a block. Smaller ones skip more of the upper triangle, larger ones make better GEMMs."""
FULLNESS = 0.75
"""A sequence shares a bucket whose longest is at most 1 / FULLNESS times as long."""
TOKENS = 512
"""Most tokens of a bucket with more than one sequence, padding included."""
KEEP = 1024
"""Up to this length the probabilities are kept for the backward; above, they are computed again."""


class Bucket(NamedTuple):
    """Sequences that are computed together."""

    indices: Tensor  # n L, into the N tokens, -1 where a shorter sequence has ended
    run: slice | None  # those indices, if they are consecutive and without padding

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, int]]) -> "Bucket":
        """Of sequences that begin at a token and have a length, the longest first; with their run, if any."""
        first, longest = sequences[0]
        run = all(each == (first + i * longest, longest) for i, each in enumerate(sequences))
        starts, lengths = torch.tensor(sequences).T[:, :, None]  # n 1 each
        column = torch.arange(longest)
        indices = torch.where(column < lengths, starts + column, -1)
        return cls(indices, slice(first, first + len(sequences) * longest) if run else None)

    def rows(self, x: Tensor) -> Tensor:
        """The bucket's part of `x` (N ..): (n L ..). Padding takes the last token: any will do."""
        part = x.index_select(0, self.indices.flatten() % len(x)) if self.run is None else x[self.run]
        return part.unflatten(0, self.indices.shape)

    def put(self, target: Tensor, part: Tensor) -> None:
        """Put `part` (n L ..) where its tokens are in `target` (N + 1 ..), padding in the last row."""
        if self.run is None:
            target.index_copy_(0, self.indices.flatten() % len(target), part.flatten(0, 1).to(target.dtype))
        else:
            target[self.run].view(part.shape).copy_(part)


Buckets = list[Bucket]


def buckets(lengths: Sequence[int]) -> Buckets:
    """The sequences of a packed row, `lengths` (n) tokens each, by like length."""
    starts = np.cumsum([0, *lengths]).tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found, begin = [], 0
    while begin < len(order):
        longest = lengths[order[begin]]
        end, last = begin + 1, min(len(order), begin + max(1, TOKENS // longest))
        while end < last and lengths[order[end]] >= FULLNESS * longest:
            end += 1
        found.append(Bucket.of([(starts[i], lengths[i]) for i in order[begin:end]]))
        begin = end
    return found


class CausalAttention(torch.autograd.Function):
    """The core of expanded MLA: softmax(scale q k^T) v in each sequence.

    Queries are rotated, and keys put together, a bucket at a time and so in the cache: done for all tokens at
    once, each of these steps reads and writes main memory.

    Args of `apply`:
        q: `N h n+r`; its last r columns are not rotated yet.
        kv: `N h n+v`, keys without position, then values.
        k_rot: `N r`, the rotated key that all heads share.
        rotations: `N r/2`, for the queries, applied by `rope`.

    Returns:
        `N h v`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        k_rot: Tensor,
        rotations: Tensor,
        rope: Rope,
        scale: float,
        plan: Buckets,
    ) -> Tensor:
        nope = q.shape[-1] - k_rot.shape[-1]
        k, v = kv[..., :nope], kv[..., nope:]
        o = _with_a_row_for_padding(v, v.shape)
        learning = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        for bucket in plan:
            qs, vs = (_heads_first(bucket.rows(x)) for x in (q, v))  # n L h .. -> n h L ..
            qs[..., nope:] = rope.rotate(qs[..., nope:], bucket.rows(rotations)[:, None])
            ks = qs.new_empty(qs.shape)
            ks[..., :nope] = bucket.rows(k).transpose(1, 2)
            ks[..., nope:] = bucket.rows(k_rot)[:, None]
            out = vs.new_empty(vs.shape)
            kept += (qs, ks, vs) if learning else ()
            qs, ks, vs, os = (x.flatten(0, 1) for x in (qs, ks, vs, out))  # n h, L ..
            for begin, end in _blocks(bucket):
                p = _probabilities(qs, ks, begin, end, scale)
                os[:, begin:end] = torch.bmm(p, vs[:, :end])
                if learning and ks.shape[1] <= KEEP:
                    kept.append(p)
            bucket.put(o, out.transpose(1, 2))
        if learning:
            ctx.save_for_backward(rotations, *kept)
            ctx.rope, ctx.scale, ctx.plan = rope, scale, plan
            ctx.shapes = q.shape, kv.shape, k_rot.shape
        return o[:-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rotations, *rest = ctx.saved_tensors
        kept, scale = iter(rest), ctx.scale
        dq, dkv, dk_rot = (_with_a_row_for_padding(grad, shape) for shape in ctx.shapes)
        nope = dq.shape[-1] - dk_rot.shape[-1]
        for bucket in ctx.plan:
            shape = len(bucket.indices), dq.shape[1]
            qs, ks, vs = (next(kept).flatten(0, 1) for _ in range(3))
            do = bucket.rows(grad).transpose(1, 2).flatten(0, 1)  # n h, L v
            if bucket.run is None:
                padding = (bucket.indices < 0)[:, None, :, None]
                do.unflatten(0, shape).masked_fill_(padding, 0)
            # Sums over blocks: in bf16 they would lose what a small block adds. The last block's keys are
            # all keys, so the sums begin with it. (In place, baddbmm is no batched GEMM but small ones.)
            wide = torch.promote_types(grad.dtype, torch.float32)
            dqs, dks, dvs = qs.new_empty(qs.shape), ks.new_empty(0), vs.new_empty(0)
            blocks = _blocks(bucket)
            ps = [None if ks.shape[1] > KEEP else next(kept) for _ in blocks]
            for (begin, end), p in zip(reversed(blocks), reversed(ps), strict=True):
                if p is None:
                    p = _probabilities(qs, ks, begin, end, scale)
                d = do[:, begin:end]
                dvs_part = torch.bmm(p.transpose(1, 2), d)
                ds = torch.bmm(d, vs[:, :end].transpose(1, 2))
                ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
                dqs[:, begin:end] = scaled_bmm(ds, ks[:, :end], scale)
                dks_part = scaled_bmm(ds.transpose(1, 2), qs[:, begin:end], scale)
                if end == ks.shape[1]:
                    dks, dvs = dks_part.to(wide), dvs_part.to(wide)
                else:
                    dks[:, :end] += dks_part
                    dvs[:, :end] += dvs_part
            dqs, dks, dvs = (x.unflatten(0, shape) for x in (dqs, dks, dvs))  # n h L ..
            dqs[..., nope:] = ctx.rope.rotate_back(dqs[..., nope:], bucket.rows(rotations)[:, None])
            bucket.put(dq, dqs.transpose(1, 2))
            bucket.put(dkv[..., :nope], dks[..., :nope].transpose(1, 2))
            bucket.put(dkv[..., nope:], dvs.transpose(1, 2))
            bucket.put(dk_rot, dks[..., nope:].sum(1))
        return dq[:-1], dkv[:-1], dk_rot[:-1], None, None, None, None


def _heads_first(x: Tensor) -> Tensor:
    """A copy of `x` (n L h d), whatever its strides: (n h L d)."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _with_a_row_for_padding(like: Tensor, shape: torch.Size) -> Tensor:
    """Room for a result of `shape` (N ..): (N + 1 ..), whose last row takes what padding computes."""
    return like.new_empty(shape[0] + 1, *shape[1:])


def _blocks(bucket: Bucket) -> list[tuple[int, int]]:
    longest = bucket.indices.shape[1]
    return [(begin, min(begin + BLOCK, longest)) for begin in range(0, longest, BLOCK)]


def _probabilities(q: Tensor, k: Tensor, begin: int, end: int, scale: float) -> Tensor:
    """Of queries `begin` to `end` over the keys up to `end`: (n h, end - begin, end)."""
    scores = scaled_bmm(q[:, begin:end], k[:, :end].transpose(1, 2), scale)
    scores[:, :, begin:].add_(above(end - begin, scores.dtype, scores.device))
    return scores.softmax(-1)
