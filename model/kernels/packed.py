"""Sequences laid end to end in one row: where each of them ends.

Attention needs no mask for it and a packed row no padding. All of it is made on the host from the lengths,
so nothing here waits for a GPU.

Sequences that begin alike can have their common prefix in the row once: the samples of a prompt, in training.
Whatever a layer does token by token is then done once for all of them. Attention alone sees the sequences in
full: `unfold` repeats the prefixes, `fold` keeps the first copy of each. A token's state depends on earlier
tokens alone, so that the states are those of the sequences apart, and so are the gradients.

Axes    s tokens of the row, f of all sequences in full (f >= s), n sequences
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shared:
    """Which tokens of sequences in full are one token of the row."""

    places: Tensor  # f, of a sequence's token in the row
    firsts: Tensor  # s, of a token of the row in the sequences: its first copy
    copies: tuple[tuple[int, int, int], ...]  # place of a prefix in the row, begin of another copy, tokens

    @classmethod
    def of(
        cls, ends: NDArray[Any], own: NDArray[Any], prefixes: NDArray[Any], device: torch.device | str
    ) -> Self:
        """For sequences that end at `ends` in full and at `own` in the row (n + 1), with `prefixes` (n)."""
        copies, places, firsts, base = list[tuple[int, int, int]](), [], [], 0
        for i, p in enumerate(prefixes.tolist()):
            begin, end, place = int(ends[i]), int(ends[i + 1]), int(own[i])
            base = base if p else place
            places += [np.arange(base, base + p), np.arange(place, int(own[i + 1]))]
            firsts.append(np.arange(begin + p, end))
            copies += [(base, begin, p)] if p else []
        at, first = (upload(torch.from_numpy(np.concatenate(x)), device) for x in (places, firsts))
        return cls(at, first, tuple(copies))


class _Unfold(torch.autograd.Function):
    """Rows of `x` (s ..) for all sequences in full: (f ..). A token's gradient is the sum over its copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: Shared) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.places)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        if dy.is_cuda:  # a launch, not one for each copy
            return dy.new_zeros(len(shared.firsts), *dy.shape[1:]).index_add_(0, shared.places, dy), None
        dx = dy.index_select(0, shared.firsts)
        for place, begin, p in shared.copies:  # index_add adds up rows one by one on a CPU
            dx[place : place + p] += dy[begin : begin + p]
        return dx, None


class _Fold(torch.autograd.Function):
    """The first copy of each token of the row from `y` (f ..): (s ..)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shared: Shared) -> Tensor:
        ctx.shared, ctx.shape = shared, y.shape
        return y.index_select(0, shared.firsts)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx.new_zeros(ctx.shape).index_copy_(0, ctx.shared.firsts, dx), None


def unfold(x: Tensor, packed: "Packed") -> Tensor:
    """Rows of `x` (s ..), one a token of the row, for all sequences in full: (f ..)."""
    out: Tensor = x if packed.shared is None else _Unfold.apply(x, packed.shared)
    return out


def fold(y: Tensor, packed: "Packed") -> Tensor:
    """The reverse of `unfold`: the first copy of each token of the row."""
    out: Tensor = y if packed.shared is None else _Fold.apply(y, packed.shared)
    return out


@dataclass(frozen=True, slots=True)
class Packed:
    """The sequences of one row. Made by `Packed.of`."""

    lengths: tuple[int, ...]  # n, tokens of each in full, on the host
    positions: Tensor  # 1 s, of a token in its own sequence
    ends: Tensor  # n + 1, int32: 0, then the end of each sequence, in full
    index: Tensor  # s, number of a token's sequence, the first of those that share it
    shared: Shared | None = None

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", prefixes: Sequence[int] = ()
    ) -> Self:
        """For sequences of these lengths, each at least 1 token, in the order of the row; `prefixes` are the
        leading tokens of each that it has in common with the one before, whose places it takes."""
        n, p = np.asarray(lengths, dtype=np.int64), np.asarray(prefixes or [0] * len(lengths), dtype=np.int64)
        ends, own = np.concatenate([[0], n.cumsum()]), np.concatenate([[0], (n - p).cumsum()])
        index = np.repeat(np.arange(len(n)), n - p)
        positions = np.arange(own[-1]) - own[index] + p[index]
        tensors = (positions[None], ends.astype(np.int32), index)
        at, last, number = (upload(torch.from_numpy(x), device) for x in tensors)
        shared = Shared.of(ends, own, p, device) if p.any() else None
        return cls(tuple(n.tolist()), at, last, number, shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`. The host does not wait: to a GPU it goes by pinned memory."""
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
