"""What all layers of one forward share: positions, which tokens see each other, what is counted.

Axes    b rows, s tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.cpu.attention import Buckets, buckets, full_rows


class Layout(NamedTuple):
    """Of packed rows (b s). Made once a forward by `Layout.of`."""

    rotations: Tensor  # s r/2 or b s r/2, complex
    buckets: Buckets | None = None  # on a CPU: the rows' sequences, for `CausalAttention`
    mask: Tensor | None = None  # elsewhere: b 1 s s, True where seen; None = causal within the row
    sequence: Tensor | None = None  # b s, number of a token's sequence, -1 = padding; None = row by row
    sequences: int = 0  # how many there are, where they are numbered
    counted: bool = False  # add to the load that `update_router_bias` evens out
    balance: bool = False  # add to the balance loss
    slots: Tensor | None = None  # b s, flat: where the tokens go in a cache

    @classmethod
    def of(
        cls,
        rotations: Tensor,
        like: Tensor,
        sequence_ids: Tensor | None = None,
        counted: bool = False,
        balance: bool = False,
    ) -> "Layout":
        """For tokens `like` (b s); the attention that its device does best gets what it needs."""
        sequence, sequences = sequence_ids, 0
        if sequence_ids is not None and balance:
            sequence, sequences = number_sequences(sequence_ids)
        plan, mask = None, None
        if like.device.type == "cpu":
            plan = full_rows(*like.shape) if sequence_ids is None else buckets(sequence_ids)
        elif sequence_ids is not None:
            mask = packed_mask(sequence_ids)
        return cls(rotations, plan, mask, sequence, sequences, counted, balance)


def packed_mask(sequence_ids: Tensor) -> Tensor:
    """True (b 1 s s) where attention is causal and within a sequence: `sequence_ids` (b s), -1 = padding.

    Padding sees earlier padding of its row and itself, so that no softmax is empty.
    """
    return (sequence_ids[:, :, None] == sequence_ids[:, None, :]).tril().unsqueeze(1)


def number_sequences(sequence_ids: Tensor) -> tuple[Tensor, int]:
    """Number the sequences of all rows 0, 1, .. (b s), keeping -1 for padding; and return their number."""
    rows = torch.arange(len(sequence_ids), device=sequence_ids.device)[:, None].expand_as(sequence_ids)
    inside = sequence_ids >= 0
    pairs = torch.stack([rows[inside], sequence_ids[inside]], dim=1)
    found, numbers = torch.unique(pairs, dim=0, return_inverse=True)
    return torch.full_like(sequence_ids, -1).masked_scatter(inside, numbers), len(found)
