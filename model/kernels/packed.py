"""Sequences laid end to end in one row: where each of them ends.

Attention needs no mask for it and a packed row no padding. All of it is made on the host from the lengths,
so nothing here waits for a GPU.

Axes    s tokens of the row, n sequences
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """The sequences of one row. Made by `Packed.of`."""

    lengths: tuple[int, ...]  # n, tokens of each, on the host
    positions: Tensor  # 1 s, of a token in its own sequence
    ends: Tensor  # n + 1, int32: 0, then the end of each sequence
    index: Tensor  # s, number of a token's sequence

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Self:
        """For sequences of these lengths, each at least 1 token, in the order of the row."""
        n = np.asarray(lengths, dtype=np.int64)
        ends = np.concatenate([[0], n.cumsum()])
        index = np.repeat(np.arange(len(n)), n)
        positions = np.arange(ends[-1]) - ends[index]
        tensors = (positions[None], ends.astype(np.int32), index)
        return cls(tuple(n.tolist()), *(upload(torch.from_numpy(x), device) for x in tensors))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`. The host does not wait: to a GPU it goes by pinned memory."""
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
