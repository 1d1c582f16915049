"""Public safetensors checkpoints to a network's tensors and back, tensor for tensor.

A checkpoint is a directory: `config.json`, and `model.safetensors` or shards that
`model.safetensors.index.json` lists. Our parameters carry the public names, with four differences:

    model.              in front of every name but `lm_head`
    layers.{L + k}      for MTP module k after L trunk layers; ours is `mtp.{k}`
    experts.{j}.*_proj  an expert at a time; ours are stacked, gate and up in one tensor
    shared tensors      the MTP modules' `embed_tokens` and `shared_head.head` repeat the trunk's, as in the
                        released weights. `save` writes the copies (vLLM reads them); `load` checks them
                        where present and does not need them. A tied `lm_head.weight` is not written.

This file knows names and tensors, not modules: a network comes as its `state`, that is
`net.state_dict(keep_vars=True)`, and its config. FP8 checkpoints (`*.weight_scale_inv`, one fp32 factor per
128 x 128 block) are dequantized when they are read.
"""

import json
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.kernels.fp8.blocks import BLOCK, Quantized, dequantize
from model.scale.fp8 import FP8_CONFIG, to_fp8

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALLEST_SHARD, LARGEST_SHARD = 64 << 20, 5_000_000_000  # bytes, if several; `save` holds them twice
RELEASE_BYTES = 64 << 20  # read from a file before its pages are freed; `load` holds them beside the network


class CheckpointError(ValueError):
    """The checkpoint cannot be read as the network that its config describes; the message names the file."""


def save(state: dict[str, Tensor], config: ModelConfig, path: str | Path, fp8: bool = False) -> None:
    """Write a network to directory `path`, see `Transformer.save`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    parts = {n: part for n, part in public_tensors(state, config) if not is_tied(config, n)}
    parts |= dict(_shared_copies(state, config))
    shards = _shards(parts)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Copies, for safetensors takes no views of one storage; one shard at a time.
        tensors = {n: parts[n].detach().clone(memory_format=torch.contiguous_format) for n in names}
        if fp8:
            tensors = dict(to_fp8(tensors))
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(part.nbytes for part in parts.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    else:
        (path / INDEX).unlink(missing_ok=True)
    for stale in set(path.glob("model*.safetensors")) - {path / file for file in weight_map.values()}:
        stale.unlink()  # of an earlier save
    values = config.to_dict() | {"torch_dtype": str(state["norm.weight"].dtype).removeprefix("torch.")}
    values |= {"quantization_config": FP8_CONFIG} if fp8 else {}
    (path / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _shards(parts: dict[str, Tensor]) -> list[list[str]]:
    """Names of the tensors of each file, in order: one file for a small network, else at least twelve."""
    most = min(LARGEST_SHARD, max(SMALLEST_SHARD, sum(part.nbytes for part in parts.values()) // 12))
    shards, size = [list[str]()], 0
    for name, part in parts.items():
        if shards[-1] and size + part.nbytes > most:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += part.nbytes
    return shards


def read_config(path: Path) -> ModelConfig:
    """The `config.json` of checkpoint directory `path`."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: a checkpoint directory has config.json and safetensors.")
    try:
        return ModelConfig.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def public_tensors(state: dict[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its public name; experts one at a time, as views that can be written through."""
    for name, tensor in state.items():
        tensor = tensor.detach()
        if name.startswith("mtp."):
            _, module, rest = name.split(".", 2)
            name = f"layers.{config.num_hidden_layers + int(module)}.{rest}"
        if not name.startswith("lm_head."):
            name = f"model.{name}"
        stem, _, leaf = name.rpartition(".")
        if not stem.endswith(".experts"):
            yield name, tensor
            continue
        for j, expert in enumerate(tensor):
            if leaf == "gate_up_proj":
                gate, up = expert.chunk(2)  # 2i d -> i d, i d
                yield f"{stem}.{j}.gate_proj.weight", gate
                yield f"{stem}.{j}.up_proj.weight", up
            else:
                yield f"{stem}.{j}.down_proj.weight", expert


def _mtp_stems(config: ModelConfig) -> list[str]:
    """The public prefix of each MTP module's names."""
    trunk = config.num_hidden_layers
    return [f"model.layers.{trunk + k}." for k in range(config.num_nextn_predict_layers)]


def trunk_weights(state: dict[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """`public_tensors` without the MTP modules and a tied head: what generation needs."""
    modules = tuple(_mtp_stems(config))
    for name, tensor in public_tensors(state, config):
        if not is_tied(config, name) and not name.startswith(modules):
            yield name, tensor


def _shared_copies(state: dict[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The trunk's embedding and head under the names that the MTP modules have for them."""
    for stem in _mtp_stems(config):
        yield f"{stem}embed_tokens.weight", state["embed_tokens.weight"]
        yield f"{stem}shared_head.head.weight", state["lm_head.weight"]


def is_tied(config: ModelConfig, name: str) -> bool:
    """Whether `name` is the output head of a network whose head is its embedding."""
    return name == "lm_head.weight" and config.tie_word_embeddings


def without_missing_mtp(config: ModelConfig, tensors: "StoredTensors") -> ModelConfig:
    """`config`, without MTP modules where the files have none; then with a warning."""
    modules = _mtp_stems(config)
    if modules and not any(name.startswith(modules[0]) for name in tensors.files):
        warnings.warn(
            f"{tensors.path} has num_nextn_predict_layers={len(modules)} but no tensor of them"
            " (transformers does not save MTP modules): loaded without.",
            stacklevel=3,
        )
        return replace(config, num_nextn_predict_layers=0)
    return config


@torch.no_grad()
def fill(state: dict[str, Tensor], config: ModelConfig, tensors: "StoredTensors") -> None:
    """Copy every weight of a network from `tensors`, and account for every tensor that is there."""
    left = set(tensors.files)
    expected = {n: part for n, part in public_tensors(state, config) if n in left or not is_tied(config, n)}
    for name, part in expected.items():
        if name not in left:
            raise CheckpointError(f"{tensors.path} lacks the tensor {name} {tuple(part.shape)}.")
    for name in sorted(expected, key=lambda name: tensors.files[name]):  # file by file
        expected[name].copy_(tensors.read(name, tuple(expected[name].shape)))
        left -= {name, f"{name}_scale_inv"}
    for name, shared in _shared_copies(state, config):
        if name in left:
            if not torch.equal(tensors.read(name, tuple(shared.shape)).to(shared), shared):
                file = tensors.files[name]
                raise CheckpointError(f"{file}: {name} differs from the trunk's, which MTP shares.")
            left -= {name, f"{name}_scale_inv"}
    # Rotary frequencies follow from the config; early conversions wrote them all the same.
    extra = sorted(name for name in left if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        file = tensors.files[extra[0]]
        raise CheckpointError(f"{file} has a tensor {extra[0]}{more}, which the config does not have.")


class StoredTensors:
    """The tensors of a checkpoint directory, single file or shards: `files` maps a name to its file."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes_read = path, 0
        self.open: dict[Path, safe_open] = {}
        index = self.path / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{index} is not a safetensors index: {error!r}.") from error
            self.files = {name: self.path / file for name, file in weight_map.items()}
        elif (self.path / SINGLE).is_file():
            self.files = dict.fromkeys(self._file(self.path / SINGLE).keys(), self.path / SINGLE)
        else:
            raise CheckpointError(f"{self.path} holds neither {SINGLE} nor {INDEX}.")

    def _file(self, file: Path) -> safe_open:
        if file not in self.open:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, though {INDEX} names it.")
            try:
                self.open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError, struct.error) as error:
                raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}.") from error
        return self.open[file]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Tensor `name`, which must have `shape`; dequantized where the checkpoint is FP8."""
        file = self.files[name]
        try:
            tensor = self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file} has no readable tensor {name}: {error}.") from error
        self.bytes_read += tensor.nbytes
        if self.bytes_read > RELEASE_BYTES:  # files are mapped: pages stay until the last map is gone
            self.open.clear()
            self.bytes_read = 0
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{file}: {name} is {tuple(tensor.shape)}, the config expects {shape}.")
        scale = f"{name}_scale_inv"
        if (scale in self.files) != (tensor.dtype == torch.float8_e4m3fn) or not tensor.is_floating_point():
            with_scale = "with" if scale in self.files else "without"
            what = f"{str(tensor.dtype).removeprefix('torch.')} {with_scale} a scale {scale}"
            raise CheckpointError(f"{file}: {name} is {what}; weights are bf16, fp16, fp32, or FP8 with it.")
        if scale not in self.files:
            return tensor
        blocks = tuple(-(-n // BLOCK) for n in shape)
        return dequantize(Quantized(tensor, self.read(scale, blocks).float(), BLOCK))


def _stored(path: Path) -> Iterator[tuple[str, safe_open]]:
    """Each tensor's name, with its open file, of the safetensors files in directory `path`."""
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            yield from ((name, tensors) for name in tensors.keys())  # noqa: SIM118 - not a dict


def check_finite(weights: Iterable[tuple[str, Tensor]], path: str | Path) -> None:
    """Raise `CheckpointError` for a weight of the checkpoint at `path` that has a NaN or an infinity."""
    for name, weight in weights:
        if not weight.isfinite().all():
            raise CheckpointError(f"{path}: the tensor {name} is not finite; take another checkpoint.")


def not_finite(path: Path) -> str:
    """The name of a tensor in directory `path` that has a NaN or an infinity, or ""."""
    found = ((name, tensors.get_tensor(name)) for name, tensors in _stored(path))
    return next((name for name, x in found if x.is_floating_point() and not x.float().isfinite().all()), "")


def quantized_tensor(path: Path) -> str:
    """A tensor in directory `path` whose numbers are no weights by themselves, and its type, or ""."""
    kinds = ((name, tensors.get_slice(name).get_dtype()) for name, tensors in _stored(path))
    return next((f"{name} ({kind})" for name, kind in kinds if kind.startswith(("F8", "I8"))), "")
