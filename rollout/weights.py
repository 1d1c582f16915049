"""A policy's weights under their public names, and a fingerprint that proves which weights are live.

Engines keep weights in layouts of their own: fused, transposed, padded, cut into blocks. The fingerprint
does not see layout: it is the sum, modulo 2^64, of a hash of every element's bits, in which zeros count
nothing. So the trainer can work it out from its own tensors, the engine from what it computes with, and
equal sums mean equal weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.checkpoint import trunk_weights
from model.dense import DensePolicy
from model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Policy = Transformer | DensePolicy
WORD = 1 << 64
CHUNK = 1 << 20
"""Elements hashed at once; the int64 copies of more would fall out of the cache."""
LATENT_PARTS = ("W_UK_T", "W_UV")
ALWAYS_FLOAT32 = "e_score_correction_bias"
"""The one tensor that stays fp32 in a bf16 engine: it decides between near-ties."""


def public_weights(source: Policy | PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an engine draws with, by public name: MTP modules and tied heads left out."""
    if isinstance(source, Transformer):
        yield from trunk_weights(source)
        return
    network = source.network if isinstance(source, DensePolicy) else source
    embedding = network.get_input_embeddings().weight
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not (name.startswith("lm_head.") and tensor is embedding):
            yield name, tensor.detach()


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
    return total % WORD


def _hash(x: Tensor) -> Tensor:
    """Finalizer of SplitMix64 (Steele, Lea, Flood 2014) in wrapping int64; 0 stays 0."""
    x = x * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    return x ^ (x >> 27)


def live_fingerprint(network: nn.Module) -> int:
    """Fingerprint of a vLLM model: its tensors' sum, packed matrices as they were before.

    Latent attention decodes with two parts cut from `kv_b_proj`, which itself serves the prefill: the
    parts' sum must be the whole's, and where it is not the result is no policy's.

    Args:
        network: modules whose matrix a GEMM library keeps to itself carry its fingerprint as `r1_packed`.
    """
    total, whole, parts, seen = 0, 0, 0, set()
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
            whole += found if path.endswith("kv_b_proj") else 0
    return (total + 3 * (parts - whole if parts else 0)) % WORD


def shapes(source: Any) -> dict[str, tuple[int, ...]]:
    """Public name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in public_weights(source)}


def check_shapes(found: dict[str, tuple[int, ...]], known: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuse weights that are not of the model that an engine opened.

    Raises:
        ValueError: with the first name whose shape differs, or that only one of them has.
    """
    for name in sorted(found.keys() | known.keys()):
        if found.get(name) != known.get(name):
            raise ValueError(
                f"these weights do not fit the engine opened on {path}: {name} is "
                f"{found.get(name, 'missing')}, the engine's {known.get(name, 'not there')}."
            )
