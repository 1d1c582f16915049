"""Settings of the engines: in-process ones, vLLM, and the pool of workers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

EngineName = Literal["auto", "native", "dense", "vllm"]
DtypeName = Literal["float32", "bfloat16"]


def torch_dtype(name: DtypeName) -> torch.dtype:
    """torch's own name for it."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSettings:
    """The engines that draw in torch: native and dense."""

    max_batch: int = 0
    """Completions that are drawn side by side; 0 = 512 for native models, 256 for dense ones."""
    cache_gib: float = 4.0
    """Most memory for what decoding remembers, GiB. It is taken as completions grow; what it has no room for
    waits."""
    speculate: bool = False
    """Native models with an MTP module: guess a token ahead with it. Changes the speed and not one token. For
    few completions at a time: with many, the guesses cost more than they save."""

    def __post_init__(self) -> None:
        if self.max_batch < 0 or self.cache_gib <= 0:
            raise ValueError(
                f"max_batch={self.max_batch} must be at least 0, cache_gib={self.cache_gib} above 0."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings:
    """vLLM, CPU or GPU build."""

    tensor_parallel: int = 1
    """GPUs that share one engine's weights."""
    gpu_memory: float = 0.4
    """Share of each GPU's memory for vLLM's weights and cache; the rest is the trainer's."""
    cache_gib: float = 2.0
    """KV cache of the CPU build, GiB."""
    context: int = 0
    """Longest sequence, tokens, prompt included; 0 = the model's max_position_embeddings."""
    max_batch: int = 256
    """Completions that are drawn side by side."""
    self_test: bool = True
    """Compare a greedy continuation with our own model before anything else, and refuse to start when the two
    differ. Costs our model's memory for that moment."""

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1 or self.max_batch < 1 or self.context < 0 or self.cache_gib <= 0:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} and max_batch={self.max_batch} must be at least 1, "
                f"context={self.context} at least 0, cache_gib={self.cache_gib} above 0."
            )
        if not 0 < self.gpu_memory < 1:
            raise ValueError(f"gpu_memory={self.gpu_memory} must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSettings:
    """Where RL draws its completions."""

    engine: EngineName = "auto"
    """auto = in process, native for DeepSeek-V3 policies and dense (transformers) for all others, from the
    trainer's own weights. vllm needs the environment of `make test-vllm`, or a GPU build of vLLM."""
    dtype: DtypeName = "float32"
    """Of the engine's weights where it has its own: vLLM, and workers."""
    workers: int = 0
    """Engines in processes of their own, on Ray; 0 = one engine in the trainer's process."""
    address: str = ""
    """Ray cluster to join, such as `auto` or `10.0.0.1:6379`; empty = a Ray on this machine, for this run."""
    worker_cpus: float = 1.0
    """CPU cores that a worker is given."""
    worker_gpus: float = 0.0
    """GPUs that a worker is given."""
    timeout_s: float = 600.0
    """A worker that gives no sign of life for so long is replaced, and its rollouts are made again."""
    local: LocalSettings = field(default_factory=LocalSettings)
    """Settings of the native and the dense engine."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """vLLM's own settings."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.timeout_s <= 0 or self.worker_cpus <= 0 or self.worker_gpus < 0:
            raise ValueError(
                f"rollout.pool.engine={self.workers} and worker_gpus={self.worker_gpus} must be at least 0, "
                f"timeout_s={self.timeout_s} and worker_cpus={self.worker_cpus} above 0."
            )
