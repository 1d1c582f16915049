"""The start of vLLM: environment, arguments, and the keys that a checkpoint's config lacks.

VLLM_ENABLE_V1_MULTIPROCESSING=0   CPU: the engine in this process
VLLM_CPU_OMP_THREADS_BIND=nobind   else one core is kept back and threads are pinned
VLLM_MLA_DISABLE=1                 CPU: its latent-attention kernel supports one shape, 512 + 64
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from rollout.checkpoint import context_and_vocabulary, read_config
from rollout.settings import DtypeName, VllmSettings

BATCHED_TOKENS = 8192
"""Prompt tokens of one step of the CPU build."""
MLA_KERNEL = (512, 64)
"""kv_lora_rank and qk_rope_head_dim of the CPU build's latent-attention kernel: DeepSeek-V3's own."""
ENGINE_ONLY = {"model", "skip_tokenizer_init", "logprobs_mode", "worker_extension_cls", "generation_config"}
ENGINE_ONLY |= {"use_tqdm_on_load", "seed"}
"""Arguments that the server does not get."""


def llm_options(
    path: Path, config: dict[str, Any], dtype: DtypeName, settings: VllmSettings, context: int, on_cpu: bool
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
        "worker_extension_cls": "rollout.vllm.engine.WorkerWeights",
        "generation_config": "vllm",  # the caller sets the sampling, not the checkpoint
        "hf_overrides": missing_keys(config),
        "use_tqdm_on_load": False,
        "seed": 0,
    }
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
    on_cpu = not torch.cuda.is_available()
    config = read_config(path)
    prepare_environment(config, on_cpu, in_process=False)
    context, _ = context_and_vocabulary(path, settings.context)
    flags = []
    for key, value in llm_options(path, config, dtype, settings, context, on_cpu).items():
        name = key.replace("_", "-")
        if isinstance(value, bool) and key not in ENGINE_ONLY:
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif key not in ENGINE_ONLY and value != {}:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
