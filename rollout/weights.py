"""Weights by their public names, and a fingerprint that proves which weights an engine computes with.

Engines keep weights in layouts of their own: fused, transposed, padded, cut into blocks. The fingerprint does
not depend on layout: it is the sum, modulo 2^64, of a hash of every element's bits, in which zeros count
nothing. So the trainer computes it from its own tensors, the engine from what it multiplies with, and equal
sums mean equal weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.policy import Policy
from rollout.engine import Renewable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
"""torch's type of the weights for each `Arithmetic`."""
MODULUS = 1 << 64
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements hashed at once: their int64 copies fit a CPU's cache, and take few launches on a GPU."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of as many bytes."""
LATENT_PARTS = ("W_UK_T", "W_UV")
LATENT = "latent parts"
"""Stands among the names of a network's tensors for those cut from `kv_b_proj`."""
ALWAYS_FLOAT32 = "e_score_correction_bias"
"""The one tensor that stays fp32 in a bf16 engine: it decides between near-ties."""


class InPlaceEngine(Renewable):
    """What engines share that generate from a policy's own tensors: an update of those is all they need."""

    policy: Policy
    in_place: bool = True
    """Off: `policy` is the engine's own copy, in another type than the trainer's."""

    def load_weights(self, source: Policy, version: int) -> None:
        """Generate from `source` from now on: in place, nothing is copied; else rounded to the copy's type.
        Raises `ValueError`: `source` lies on another device than the engine's policy."""
        here, there = device_of(self.policy), device_of(source)
        if here != there:
            raise ValueError(
                f"{type(self).__name__} generates on {here}, and the policy lies on {there}: it needs the "
                "trainer's device; set the stage's device, or use engine vllm or workers."
            )
        if self.in_place:
            self.policy = source
        else:
            self.policy.load_state_dict(source.state_dict())
        self.version = version

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

    def rest(self) -> bool:
        """Free what `close` frees. The weights are the trainer's own and stay."""
        self.close()
        return False

    def close(self) -> None:
        """Nothing to free: a cache lives as long as its request."""


def copied(policy: Policy, dtype: torch.dtype) -> Policy:
    """A frozen copy whose parameters are of `dtype`; rotary frequencies and gate biases stay in fp32."""
    made = policy.frozen()
    for p in made.parameters():
        p.data = p.data.to(dtype)
    return made


def device_of(policy: Policy) -> torch.device:
    """Where a policy's tensors lie."""
    return next(policy.parameters()).device


def held_in(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which an engine of `dtype` holds the tensor `name`."""
    return torch.float32 if name.endswith(ALWAYS_FLOAT32) else dtype


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Sum of the elements' hashes modulo 2^64, whatever their order, grouping and padding with zeros."""
    return sum(fingerprints(tensors)) % MODULUS


def fingerprints(tensors: Iterable[Tensor]) -> list[int]:
    """The fingerprint of each tensor, computed where it lies; one wait for the device in all."""
    sums = [_sum(tensor) for tensor in tensors]
    return [total % MODULUS for total in torch.stack(sums).tolist()] if sums else []


def _sum(tensor: Tensor) -> Tensor:
    """Sum of the elements' hashes, a wrapping int64 scalar on the tensor's device."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    if bits.element_size() <= 2 and bits.device.type == "cpu" and len(bits) >= CHUNK["cpu"]:
        low, high = torch.iinfo(bits.dtype).min, torch.iinfo(bits.dtype).max
        for part in bits.split(CHUNK["cpu"]):  # counting is faster than hashing where values are few
            total = total + torch.bincount(part.int() - low, minlength=high - low + 1)
        return (total * _hash(torch.arange(low, high + 1))).sum()
    chunk = CHUNK["cuda" if bits.is_cuda else "cpu"]
    x = torch.empty(min(chunk, len(bits)), dtype=torch.int64, device=bits.device)
    for part in bits.split(chunk):
        total += _hash(x[: len(part)].copy_(part)).sum()
    return total


def _hash(x: Tensor) -> Tensor:
    """Finalizer of SplitMix64 (Steele, Lea, Flood 2014) in wrapping int64, in place; 0 stays 0."""
    x *= -0x61C8864680B583EB
    x ^= x >> 30
    x *= -0x40A7B892E31B1A47
    x ^= x >> 27
    return x


def live_fingerprints(network: nn.Module) -> dict[str, int]:
    """The fingerprint of each tensor of a vLLM model by its path, packed matrices as before packing.

    Modules whose matrix is packed for a GEMM library have its fingerprint as `r1_packed`. Latent attention
    decodes with two parts that are cut from `kv_b_proj`, which itself serves the prefill: the entry `LATENT`
    is 0 where the parts add up to it, else it makes the sum match no policy."""
    known, measured, seen = dict[str, int](), dict[str, Tensor](), set[int]()
    for path, module in network.named_modules():
        packed: int | None = getattr(module, "r1_packed", None)
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if packed is not None and name.endswith(".weight") and id(parameter) not in seen:
                known[name] = packed
            elif id(parameter) not in seen:
                measured[name] = parameter
            seen.add(id(parameter))
    known |= dict(zip(measured, fingerprints(measured.values()), strict=True))
    parts = [known.pop(name) for name in list(known) if name.endswith(LATENT_PARTS)]
    if parts:
        matrices = [found for name, found in known.items() if name.endswith("kv_b_proj.weight")]
        known[LATENT] = 3 * (sum(parts) - sum(matrices)) % MODULUS
    return known


def over_ranks(found: Sequence[Mapping[str, int]]) -> int:
    """The fingerprint of an engine's weights from each rank's `live_fingerprints`.

    Shards differ and add up. A tensor that is equal on all ranks is replicated and counts once."""
    total = 0
    for name in found[0]:
        values = [rank.get(name, 0) for rank in found]
        total += values[0] if len(set(values)) == 1 else sum(values)
    return total % MODULUS


def shapes(source: Policy) -> dict[str, tuple[int, ...]]:
    """Public name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in source.public_weights()}


def check_shapes(found: dict[str, tuple[int, ...]], known: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuse weights `found` where an engine opened a model of shapes `known`.
    Raises `ValueError`: with the first name whose shape differs, or that is in one of them alone."""
    for name in sorted(found.keys() | known.keys()):
        if found.get(name) != known.get(name):
            raise ValueError(
                f"these weights do not fit the engine opened on {path}: {name} is "
                f"{found.get(name, 'missing')}, the engine's {known.get(name, 'not there')}."
            )
