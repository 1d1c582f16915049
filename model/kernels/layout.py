"""What all layers of one forward share: positions, which tokens see each other, what is counted.

Axes    b rows, s tokens of a row
"""

from typing import NamedTuple

from torch import Tensor

from model.kernels.cpu.attention import Buckets, buckets
from model.kernels.packed import Packed


class Layout(NamedTuple):
    """Of the sequences of one forward. Made once by `Layout.of`."""

    rotations: Tensor  # s r/2 or b s r/2, complex
    packed: Packed  # the sequences, rows laid end to end
    buckets: Buckets | None = None  # on a CPU: the same by like length, for `CausalAttention`
    counted: bool = False  # add to the load that `update_router_bias` evens out
    balance: bool = False  # add to the balance loss
    slots: Tensor | None = None  # b s, flat: where the tokens go in a cache
    replay: bool = True  # repeat recorded experts; else they are only compared with the gate's

    @classmethod
    def of(cls, rotations: Tensor, packed: Packed, counted: bool = False, balance: bool = False) -> "Layout":
        """For the sequences of `packed`; the attention that the device does best gets what it needs."""
        plan = buckets(packed.lengths) if rotations.device.type == "cpu" else None
        return cls(rotations, packed, plan, counted, balance)
