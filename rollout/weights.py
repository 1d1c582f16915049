"""Weights by their public names, and a fingerprint that proves which weights an engine computes with.

Engines keep weights in layouts of their own: fused, transposed, padded, cut into blocks. The fingerprint does
not depend on layout: it is the sum, modulo 2^64, of a hash of every element's bits, in which zeros count
nothing. So the trainer computes it from its own tensors, the engine from what it multiplies with, and equal
sums mean equal weights.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from model.policy import Policy
from rollout.engine import RolloutEngine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""torch's type for each `DtypeName`."""
MODULUS = 1 << 64
CHUNK = 1 << 20
"""Elements hashed at once; the int64 copies of more would fall out of the cache."""
LATENT_PARTS = ("W_UK_T", "W_UV")
ALWAYS_FLOAT32 = "e_score_correction_bias"
"""The one tensor that stays fp32 in a bf16 engine: it decides between near-ties."""


class InPlaceEngine(RolloutEngine):
    """What engines share that generate from a policy's own tensors: an update of those is all they need."""

    policy: Policy
    version: int = 0
    """Of the weights."""

    def load_weights(self, source: Policy, version: int) -> None:
        """Generate from `source` from now on, in place; nothing is copied."""
        self.policy, self.version = source, version

    @torch.no_grad()
    def load_tensors(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy tensors by public name into the policy; those that fit its names and shapes."""
        own = dict(self.policy.public_weights())
        for name, tensor in weights:
            own[name].copy_(tensor)
        self.version = version

    def live_weights(self) -> int:
        """Fingerprint of the policy's weights."""
        return fingerprint(tensor for _, tensor in self.policy.public_weights())

    def drain(self) -> dict[str, float]:
        """See `RolloutEngine.drain`."""
        return {}

    def close(self) -> None:
        """Nothing to free: a cache lives as long as its request."""


def in_dtype(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights as an engine of `dtype` holds them."""
    for name, tensor in weights:
        yield name, tensor.to(torch.float32 if name.endswith(ALWAYS_FLOAT32) else dtype)


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Sum of the elements' hashes modulo 2^64, whatever their order, grouping and padding with zeros."""
    total = 0
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        for part in bits.split(CHUNK):
            total += int(_hash(part.to(torch.int64)).sum())
    return total % MODULUS


def _hash(x: Tensor) -> Tensor:
    """Finalizer of SplitMix64 (Steele, Lea, Flood 2014) in wrapping int64; 0 stays 0."""
    x = x * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    return x ^ (x >> 27)


def live_fingerprint(network: nn.Module) -> int:
    """Fingerprint of a vLLM model: the sum over its tensors, packed matrices as they were before packing.

    Modules whose matrix is packed for a GEMM library have its fingerprint as `r1_packed`. Latent attention
    decodes with two parts that are cut from `kv_b_proj`, which itself serves the prefill. If the parts do not
    add up to it, the result matches no policy.
    """
    total, complete, parts, seen = 0, 0, 0, set()
    for path, module in network.named_modules():
        packed: int | None = getattr(module, "r1_packed", None)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found = packed if packed is not None and name == "weight" else fingerprint([parameter])
            if name in LATENT_PARTS:
                parts += found
                continue
            total += found
            complete += found if path.endswith("kv_b_proj") else 0
    return (total + 3 * (parts - complete if parts else 0)) % MODULUS


def shapes(source: Policy) -> dict[str, tuple[int, ...]]:
    """Public name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in source.public_weights()}


def check_shapes(found: dict[str, tuple[int, ...]], known: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuse weights `found` where an engine opened a model of shapes `known`.

    Raises:
        ValueError: with the first name whose shape differs, or that is in one of them alone.
    """
    for name in sorted(found.keys() | known.keys()):
        if found.get(name) != known.get(name):
            raise ValueError(
                f"these weights do not fit the engine opened on {path}: {name} is "
                f"{found.get(name, 'missing')}, the engine's {known.get(name, 'not there')}."
            )
