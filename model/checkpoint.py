"""Public safetensors checkpoints to modules and back, tensor for tensor.

A checkpoint is a directory: `config.json`, and `model.safetensors` or shards that
`model.safetensors.index.json` lists. Our parameters carry the public names, with four differences:

    model.              in front of every name but `lm_head`
    layers.{L + k}      for MTP module k after L trunk layers; ours is `mtp.{k}`
    experts.{j}.*_proj  an expert at a time; ours are stacked, gate and up in one tensor
    shared tensors      the MTP modules' `embed_tokens` and `shared_head.head` repeat the trunk's, as in the
                        released weights. `save` writes the copies (vLLM reads them); `load` checks them
                        where present and does not need them. A tied `lm_head.weight` is not written.

FP8 checkpoints (`*.weight_scale_inv`, one fp32 factor per 128 x 128 block) are dequantized on the way in.
"""

import json
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.kernels.fp8.blocks import BLOCK, Quantized, dequantize
from model.scale.fp8 import FP8_CONFIG, to_fp8
from model.transformer import Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALLEST_SHARD, LARGEST_SHARD = 64 << 20, 5_000_000_000
"""Bytes of a file, where there are several; what `save` holds twice."""
RELEASE_BYTES = 64 << 20
"""Bytes read from a file before its pages are given back; what `load` holds beside the network."""


class CheckpointError(ValueError):
    """The checkpoint cannot be read as the network that its config describes; the message says where."""


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The network of a public deepseek_v3 checkpoint directory, in `dtype` on `device`."""
    path = Path(path)
    config = read_config(path)
    with _Tensors(path) as tensors:
        first_mtp = f"model.layers.{config.num_hidden_layers}."
        if config.num_nextn_predict_layers and not any(name.startswith(first_mtp) for name in tensors.files):
            warnings.warn(
                f"{path} has num_nextn_predict_layers={config.num_nextn_predict_layers} but no tensor of them"
                " (transformers does not save MTP modules): loaded without.",
                stacklevel=2,
            )
            config = replace(config, num_nextn_predict_layers=0)
        with torch.device("meta"):
            net = Transformer(config)
        net.to(dtype).to_empty(device=device)
        if config.tie_word_embeddings:  # to_empty gives every module a tensor of its own
            net.lm_head.weight = net.embed_tokens.weight
        for moe in net.moe_layers():
            moe.gate.load.zero_()  # no checkpoint has the counts
        _fill(net, tensors)
    return net


def save(net: Transformer, path: str | Path, fp8: bool = False) -> None:
    """Write `net` to directory `path` so that `load`, transformers and vLLM read it back.

    `fp8` writes linear layers and experts in FP8 blocks, as the released weights are: half of bf16's size.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    parts = {name: part for name, part in _public(net) if not _is_tied(net, name)} | dict(_shared_copies(net))
    shards = _shards(parts)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Copies, for safetensors takes no views of one storage; a shard's worth at a time.
        tensors = {n: parts[n].detach().clone(memory_format=torch.contiguous_format) for n in names}
        if fp8:
            tensors = dict(to_fp8(tensors))
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(parts[name].nbytes for name in parts)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    else:
        (path / INDEX).unlink(missing_ok=True)
    for stale in set(path.glob("model*.safetensors")) - {path / file for file in weight_map.values()}:
        stale.unlink()  # of an earlier save
    dtype = str(net.norm.weight.dtype).removeprefix("torch.")
    config = (
        net.config.to_dict() | {"torch_dtype": dtype} | ({"quantization_config": FP8_CONFIG} if fp8 else {})
    )
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _shards(parts: dict[str, Tensor]) -> list[list[str]]:
    """Names of the tensors of each file, in order: one file for a small network, else at least twelve."""
    most = min(LARGEST_SHARD, max(SMALLEST_SHARD, sum(part.nbytes for part in parts.values()) // 12))
    shards: list[list[str]] = [[]]
    size = 0
    for name, part in parts.items():
        if shards[-1] and size + part.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += part.nbytes
    return shards


def read_config(path: Path) -> ModelConfig:
    """The `config.json` of checkpoint directory `path`."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing: a checkpoint is a directory with config.json and safetensors."
        )
    try:
        return ModelConfig.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _public(net: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its public name; experts one at a time, as views that can be written through."""
    trunk = net.config.num_hidden_layers
    for name, tensor in net.state_dict(keep_vars=True).items():
        tensor = tensor.detach()
        if name.startswith("mtp."):
            _, module, rest = name.split(".", 2)
            name = f"layers.{trunk + int(module)}.{rest}"
        if not name.startswith("lm_head."):
            name = f"model.{name}"
        stem, _, leaf = name.rpartition(".")
        for j, expert in enumerate(tensor if stem.endswith(".experts") else ()):
            if leaf == "gate_up_proj":
                gate, up = expert.chunk(2)  # 2i d -> i d, i d
                yield f"{stem}.{j}.gate_proj.weight", gate
                yield f"{stem}.{j}.up_proj.weight", up
            else:
                yield f"{stem}.{j}.down_proj.weight", expert
        if not stem.endswith(".experts"):
            yield name, tensor


def trunk_weights(net: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The weights without the MTP modules, under their public names, as views: what an engine draws with."""
    first_mtp = tuple(f"model.layers.{net.config.num_hidden_layers + k}." for k in range(len(net.mtp)))
    for name, tensor in _public(net):
        if not _is_tied(net, name) and not (first_mtp and name.startswith(first_mtp)):
            yield name, tensor


def _shared_copies(net: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The trunk's embedding and head under the names that the MTP modules have for them."""
    for k in range(len(net.mtp)):
        stem = f"model.layers.{net.config.num_hidden_layers + k}"
        yield f"{stem}.embed_tokens.weight", net.embed_tokens.weight
        yield f"{stem}.shared_head.head.weight", net.lm_head.weight


def _is_tied(net: Transformer, name: str) -> bool:
    return name == "lm_head.weight" and net.config.tie_word_embeddings


@torch.no_grad()
def _fill(net: Transformer, tensors: "_Tensors") -> None:
    """Copy every weight of `net` from `tensors`, and account for every tensor that is there."""
    left = set(tensors.files)
    wanted = {n: part for n, part in _public(net) if n in left or not _is_tied(net, n)}
    for name in wanted:
        if name not in left:
            raise CheckpointError(f"{tensors.path} lacks the tensor {name} {tuple(wanted[name].shape)}.")
    for name in sorted(wanted, key=lambda name: tensors.files[name]):  # file by file
        target = wanted[name]
        target.copy_(tensors.read(name, tuple(target.shape)))
        left -= {name, f"{name}_scale_inv"}
    for name, shared in _shared_copies(net):
        if name in left:
            if not torch.equal(tensors.read(name, tuple(shared.shape)).to(shared), shared):
                raise CheckpointError(
                    f"{tensors.files[name]}: {name} differs from the trunk's, which MTP shares."
                )
            left -= {name, f"{name}_scale_inv"}
    # Rotary frequencies follow from the config; early conversions wrote them all the same.
    extra = sorted(name for name in left if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{tensors.files[extra[0]]} has a tensor {extra[0]}{more} that the config has no place for."
        )


class _Tensors:
    """The tensors of a checkpoint directory, single file or shards: `files` maps a name to its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: dict[Path, safe_open] = {}
        self.bytes_read = 0

    def __enter__(self) -> "_Tensors":
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
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()

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
        if (
            self.bytes_read > RELEASE_BYTES
        ):  # files are mapped: what was read stays until the last map is gone
            self.open.clear()
            self.bytes_read = 0
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{file}: {name} is {tuple(tensor.shape)}, the config says {shape}.")
        scale = f"{name}_scale_inv"
        if scale not in self.files:
            return tensor
        return dequantize(Quantized(tensor, self.read(scale, _blocks(shape)).float(), BLOCK))


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // BLOCK) for n in shape)
