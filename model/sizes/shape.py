"""What a network's size, work and memory follow from, whatever its architecture.

`model.sizes.dense` and `model.sizes.native` read a `Shape` off a config, without building a module.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Parameters(NamedTuple):
    """Weights of a network."""

    total: int
    """All of them, MTP modules included, a tied head counted once."""
    active: int
    """Those of the trunk that one token meets."""
    mtp: int
    """Those of the multi-token-prediction modules."""


class Kept(NamedTuple):
    """Numbers a token that a layer keeps for the backward."""

    own: int
    """In the network's own dtype."""
    fp32: int
    casts: int = 0
    """fp32 copies, which a network in fp32 does without."""
    on_gpus: int = 0
    """In its own dtype, by kernels of GPUs alone."""
    on_cpus: int = 0
    """In fp32, by layers that are one kernel on GPUs."""

    def bytes(self, itemsize: int, device: str = "cuda") -> int:
        """All of them; a number in the network's dtype has `itemsize` bytes."""
        own = itemsize * (self.own + (self.on_gpus if device == "cuda" else 0))
        return own + 4 * (self.fp32 + self.casts * (itemsize < 4) + self.on_cpus * (device == "cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Counts of a network; those that do not name MTP are of the trunk."""

    parameters: Parameters
    width: int
    """Numbers of a token's state."""
    vocab: int
    products: int
    """Weights that the layers multiply one token with."""
    mtp_products: int = 0
    """The same of all MTP modules."""
    pair: int
    """Multiplications of a query with one key and its value, all heads of a layer."""
    windows: tuple[int | None, ...]
    """Of each layer, how many keys a query sees, its own included. None = all before it."""
    mtp_modules: int = 0
    kept: tuple[Kept, ...]
    """Of each layer."""
