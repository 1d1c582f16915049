"""Settings of the engines: in-process ones, vLLM, and the pool of workers. Standard library only."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rollout.ranges import Count, Natural, NotNegative, Positive, Range, Settings

EngineName = Literal["auto", "native", "dense", "vllm"]
DtypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class LocalSettings(Settings):
    """The engines in torch: native and dense."""

    max_batch: Natural = 0
    """Completions generated side by side, at most; 0 = 512 for native models, 256 for dense ones."""
    cache_gib: Positive = 4.0
    """Largest cache of keys and values (latents), GiB. It grows with the completions; those that do not fit
    wait."""
    speculate: bool = False
    """Guess one token ahead with the MTP module of a native model. Changes the speed, not the tokens. For few
    completions at a time: with many, the guesses cost more than they save."""


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
    """Completions generated side by side, at most."""
    self_test: bool = True
    """Compare a greedy continuation with our own model first, and refuse to start when the two differ. Takes
    the memory of our model during the comparison."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """The engine that generates RL's completions."""

    engine: EngineName = "auto"
    """auto = in the trainer's process and from its own weights: native for DeepSeek-V3 policies, dense
    (transformers) for all others. vllm needs the environment of `make test-vllm`, or a GPU build of vLLM."""
    dtype: DtypeName = "float32"
    """Type of the weights of engines that have their own: vLLM, and workers."""
    workers: Natural = 0
    """Engines in processes of their own, on Ray; 0 = one engine in the trainer's process."""
    address: str = ""
    """Ray cluster to join, such as `auto` or `10.0.0.1:6379`; empty = a Ray on this machine, for this run."""
    worker_cpus: Positive = 1.0
    """CPU cores of each worker."""
    worker_gpus: NotNegative = 0.0
    """GPUs of each worker; a fraction shares one."""
    timeout_s: Positive = 600.0
    """Seconds without a rollout after which a worker is replaced and its rollouts are generated again."""
    local: LocalSettings = field(default_factory=LocalSettings)
    """Settings of the native and the dense engine."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """vLLM's own settings."""
