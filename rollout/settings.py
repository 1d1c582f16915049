"""Settings of the engines: in-process ones, vLLM, and the pool of workers. Standard library only."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rollout.ranges import Count, Natural, NotNegative, Positive, Range, Settings

EngineName = Literal["auto", "native", "dense", "vllm", "endpoint"]
DtypeName = Literal["float32", "bfloat16"]
Arithmetic = Literal["float32", "bfloat16", "fp8"]
Switch = Literal["auto", "on", "off"]
GiB = Annotated[float, Range(0, 1 << 20, open_low=True)]


@dataclass(frozen=True, kw_only=True)
class LocalSettings(Settings):
    """The engines in torch: native and dense."""

    max_batch: Natural = 0
    """Completions generated side by side, at most; 0 = 512 for native models, 256 for dense ones."""
    cache_gib: GiB = 4.0
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
    data_parallel: Count = 1
    """Copies of the engine, each in a process of its own on `tensor_parallel` GPUs; the prompts are shared
    out. Above 1 they are workers on Ray, none of them on the trainer's GPU."""
    expert_parallel: bool = False
    """Split a mixture of experts over the `tensor_parallel` GPUs by experts, not each expert's matrices. GPUs
    only."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8 = vLLM rounds the weights to 8 bits, which GPUs since Hopper multiply. What is live then has no
    fingerprint to compare; each transfer still has. The importance correction must hold the difference."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache; auto = the weights'. fp8 holds twice the tokens, and is another policy."""
    sleep: Switch = "auto"
    """Free vLLM's weights and cache while the trainer works. auto = where both share a GPU."""
    seed_each: Switch = "auto"
    """A random generator for each rollout: the same rollout in any batch. auto = on CPUs; on GPUs it launches
    a kernel a rollout and token. off = one generator for all: rollouts depend on what they are batched with,
    and a resumed run samples others."""
    gpu_memory: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.4
    """Share of each GPU's memory for vLLM's weights and cache; the rest is the trainer's."""
    cache_gib: GiB = 2.0
    """KV cache of the CPU build, GiB."""
    context: Natural = 0
    """Longest sequence, tokens, prompt included; 0 = the model's max_position_embeddings."""
    max_batch: Count = 256
    """Completions generated side by side, at most."""
    self_test: bool = True
    """Compare a greedy continuation with our own model first, and refuse to start when the two differ. Takes
    the memory of our model during the comparison."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "expert_parallel splits experts over the GPUs of one engine: set tensor_parallel above 1 too."
            )


@dataclass(frozen=True, kw_only=True)
class EndpointSettings(Settings):
    """Engine endpoint: a model served by an OpenAI-compatible API at OPENAI_BASE_URL, key OPENAI_API_KEY."""

    in_flight: Annotated[int, Range(1, 1_024)] = 16
    """Requests at once, at most; each is one completion."""
    timeout_s: Positive = 600.0
    """Seconds that a request may take."""
    retries: Natural = 5
    """Repetitions of a request that fails in a way that may pass: a lost connection, a timeout, a rate limit
    (after the time that the server names, up to two minutes), a server error, an answer that is none."""
    send_seed: bool = True
    """Send each request a seed of its own; off for servers that refuse one: then no sampling repeats."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """The engine that generates RL's completions."""

    engine: EngineName = "auto"
    """auto = in the trainer's process and from its own weights: native for DeepSeek-V3 policies, dense
    (transformers) for all others. vllm: the make targets set up an environment with it (.venv-vllm).
    endpoint: reject only; `init_from` is the served model's name."""
    dtype: Literal["auto", Arithmetic] = "auto"
    """Type of the engine's weights. fp8 = bfloat16, and products of linear layers and experts in blockwise
    FP8, as in the forward of `optim.precision` fp8; native and dense engines. auto = the trainer's precision
    (vLLM: bfloat16 for fp8); without a trainer (reject) the checkpoint's own on a GPU, float32 on a CPU. An
    engine in the trainer's process that differs from it has a copy of the weights, refreshed each step."""
    routed_experts: bool = False
    """Record the experts of every token, so that RL logs how many the trainer would choose otherwise. Native
    policies only; vLLM has it on GPUs."""
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
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    """Settings of engine endpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "fp8" and self.engine in ("vllm", "endpoint"):
            instead = "set vllm.quantization to it" if self.engine == "vllm" else "leave it out"
            raise ValueError(f"dtype=fp8 is not for engine {self.engine}: {instead}.")
        if self.workers and self.engine == "endpoint":
            raise ValueError(f"workers={self.workers} must be 0 with engine endpoint: set its in_flight.")
        if self.workers and self.vllm.data_parallel > 1:
            raise ValueError(
                f"workers={self.workers} and vllm.data_parallel={self.vllm.data_parallel} both set the "
                "number of engines: set one of them."
            )
