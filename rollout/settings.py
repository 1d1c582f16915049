"""Settings of the engines: in-process ones, vLLM, and the pool of workers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from rollout.ranges import Count, Natural, NotNegative, Positive, Range, Settings

if TYPE_CHECKING:
    import torch

EngineName = Literal["auto", "native", "dense", "vllm"]
DtypeName = Literal["float32", "bfloat16"]


def torch_dtype(name: DtypeName) -> torch.dtype:
    """torch's own name for it."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@dataclass(frozen=True, kw_only=True)
class LocalSettings(Settings):
    """The engines that draw in torch: native and dense."""

    max_batch: Natural = 0
    """Completions that are drawn side by side; 0 = 512 for native models, 256 for dense ones."""
    cache_gib: Positive = 4.0
    """Most memory for what decoding remembers, GiB. It is taken as completions grow; what it has no room for
    waits."""
    speculate: bool = False
    """Native models with an MTP module: guess a token ahead with it. Changes the speed and not one token. For
    few completions at a time: with many, the guesses cost more than they save."""


@dataclass(frozen=True, kw_only=True)
class VllmSettings(Settings):
    """vLLM, CPU or GPU build."""

    tensor_parallel: Count = 1
    """GPUs that share one engine's weights."""
    gpu_memory: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.4
    """Share of each GPU's memory for vLLM's weights and cache; the rest is the trainer's."""
    cache_gib: Positive = 2.0
    """KV cache of the CPU build, GiB."""
    context: Natural = 0
    """Longest sequence, tokens, prompt included; 0 = the model's max_position_embeddings."""
    max_batch: Count = 256
    """Completions that are drawn side by side."""
    self_test: bool = True
    """Compare a greedy continuation with our own model before anything else, and refuse to start when the two
    differ. Costs our model's memory for that moment."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """Where RL draws its completions."""

    engine: EngineName = "auto"
    """auto = in process, native for DeepSeek-V3 policies and dense (transformers) for all others, from the
    trainer's own weights. vllm needs the environment of `make test-vllm`, or a GPU build of vLLM."""
    dtype: DtypeName = "float32"
    """Of the engine's weights where it has its own: vLLM, and workers."""
    workers: Natural = 0
    """Engines in processes of their own, on Ray; 0 = one engine in the trainer's process."""
    address: str = ""
    """Ray cluster to join, such as `auto` or `10.0.0.1:6379`; empty = a Ray on this machine, for this run."""
    worker_cpus: Positive = 1.0
    """CPU cores that a worker is given."""
    worker_gpus: NotNegative = 0.0
    """GPUs that a worker is given."""
    timeout_s: Positive = 600.0
    """A worker that gives no sign of life for so long is replaced, and its rollouts are made again."""
    local: LocalSettings = field(default_factory=LocalSettings)
    """Settings of the native and the dense engine."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """vLLM's own settings."""
