"""Open an engine by name. The only file that knows every engine; nothing else in this package imports it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from model.policy import Policy
from rollout.checkpoint import eos_of, read_config
from rollout.endpoint.engine import EndpointEngine
from rollout.engine import RolloutEngine
from rollout.local import LOCAL, engine_name, open_local
from rollout.pool.engine import RolloutPool
from rollout.settings import Arithmetic, DtypeName, EngineName, LocalSettings, RolloutSettings, VllmSettings
from rollout.text.tokenizer import has_tokenizer, load_tokenizer
from rollout.types import Eos
from rollout.vllm.engine import VllmEngine
from rollout.vllm.options import cpu_build
from rollout.weights import DTYPES, copied, device_of

ENGINES: dict[str, Callable[..., RolloutEngine]] = {
    "native": open_local,
    "dense": open_local,
    "vllm": VllmEngine,
    "endpoint": EndpointEngine,
}
"""Each opens an engine from the arguments of `open_local`. The names are `EngineName`, `auto` apart."""


def open_engine(
    path: Path | str,
    engine: EngineName = "auto",
    dtype: DtypeName = "float32",
    device: str = "cpu",
    vllm: VllmSettings | None = None,
    local: LocalSettings | None = None,
    workers: int = 0,
    threads: int = 0,
    task_prompts: int = 0,
) -> tuple[RolloutEngine, PreTrainedTokenizerFast | None]:
    """An engine with the checkpoint's weights, and the checkpoint's tokenizer if it has one.

    Args:
        engine: `auto` takes native for the architectures that `model/` implements, else dense.
        device: of the in-process engines; vLLM takes the device that its build is for.
        workers: engines in processes of their own, on Ray, each with `threads` CPU threads (0 = one) and, on
            GPUs, with its own; `task_prompts` is `RolloutPool`'s. 0 = one engine in this process.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: engine native for an architecture that is not `model/`'s, or speculation with a model
            that has no MTP module.
        ModuleNotFoundError: engine vllm where vLLM is not installed.
        StaleWeights: vLLM does not compute what our own model does.
    """
    name = engine_name(path, engine)
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    settings = RolloutSettings(
        engine=engine,
        dtype=dtype,
        vllm=vllm or VllmSettings(),
        local=local or LocalSettings(),
        workers=workers,
        worker_cpus=float(max(1, threads)),
    )
    if workers and (device.startswith("cuda") if name in LOCAL else not cpu_build()):
        settings = replace(settings, worker_gpus=float(settings.vllm.tensor_parallel))
    settings = with_workers(settings, name)
    eos = eos_of(path, tokenizer.eos_token_id if tokenizer else None)
    if settings.workers:
        pool = RolloutPool(path, settings, open_worker_engine, eos_token_id=eos, task_prompts=task_prompts)
        return pool, tokenizer
    return ENGINES[name](path, settings, device=device, tokenizer=tokenizer, eos_token_id=eos), tokenizer


def with_workers(settings: RolloutSettings, engine: str) -> RolloutSettings:
    """The settings with the copies of `vllm.data_parallel` as workers of a pool, each on GPUs of its own.
    Raises `ModuleNotFoundError` or `ValueError`: as `cpu_build`; or workers without a GPU for vLLM's GPU
    build."""
    if engine != "vllm":
        return settings
    vllm, gpus = settings.vllm, 0 if cpu_build() else settings.vllm.tensor_parallel
    if vllm.data_parallel > 1:
        one = replace(vllm, data_parallel=1)
        return replace(settings, workers=vllm.data_parallel, worker_gpus=float(gpus), vllm=one)
    if settings.workers and gpus and not settings.worker_gpus:
        raise ValueError(
            "vLLM here is the GPU build, and rollout.worker_gpus = 0 hides the GPUs from its workers: set "
            f"--rollout.worker-gpus {gpus}, or less than 1 to share a GPU."
        )
    return settings


def engine_for(
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    settings: RolloutSettings | None = None,
    path: Path | None = None,
    dtype: Arithmetic | None = None,
) -> RolloutEngine:
    """An engine for a policy in training.

    Args:
        settings: the engine. None, and every in-process engine of the trainer's type, generate from the
            trainer's own weights in place: there is nothing to copy.
        path: the policy's checkpoint, which engines with weights of their own open.
        dtype: what the trainer computes in, for `settings.dtype` auto; None = there is no trainer.

    Raises:
        ValueError: an engine that is not for this policy.
        ModuleNotFoundError: vLLM or Ray is not installed here.
        StaleWeights: vLLM does not compute what the policy does.
    """
    settings = settings or RolloutSettings()
    name = policy.engine if settings.engine == "auto" else settings.engine
    if name in LOCAL and name != policy.engine:
        raise ValueError(
            f"the policy is a {policy.engine} model, which rollout.engine = {name!r} does not generate from; "
            "use auto or vllm."
        )
    if settings.routed_experts and not policy.routed:
        raise ValueError(
            "rollout.routed_experts (router_replay) is for native policies with experts; this one is dense: "
            "switch it off."
        )
    settings = with_workers(settings, name)
    if settings.dtype == "auto" and (settings.workers or name not in LOCAL):
        own = "bfloat16" if dtype == "fp8" and name not in LOCAL else dtype
        settings = replace(settings, dtype=own or stored_dtype(policy, path))
    eos = eos_of(path, tokenizer.eos_token_id) if path is not None else tokenizer.eos_token_id
    if settings.workers:
        assert path is not None
        trainer = device_of(policy)
        return RolloutPool(path, settings, open_worker_engine, eos_token_id=eos, trainer=trainer)
    trained = dtype or str(next(policy.parameters()).dtype).removeprefix("torch.")
    if name in LOCAL and settings.dtype not in ("auto", trained):
        copy = copied(policy, DTYPES[settings.dtype])
        engine = open_local(path or "", settings, policy=copy, tokenizer=tokenizer, eos_token_id=eos)
        engine.in_place = False
        return engine
    return ENGINES[name](path, settings, policy=policy, tokenizer=tokenizer, eos_token_id=eos)


def stored_dtype(policy: Policy, path: Path | None) -> DtypeName:
    """The type of a policy without a trainer: on a GPU its checkpoint's, on a CPU float32."""
    config = read_config(path) if path is not None and device_of(policy).type == "cuda" else {}
    return "bfloat16" if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else "float32"


def open_worker_engine(path: str, settings: RolloutSettings, device: str, eos_token_id: Eos) -> RolloutEngine:
    """The engine of one worker of a pool, in the worker's own process."""
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    opener = ENGINES[engine_name(path, settings.engine)]
    return opener(path, settings, device=device, tokenizer=tokenizer, eos_token_id=eos_token_id)
