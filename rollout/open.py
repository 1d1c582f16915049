"""Open a checkpoint directory as a rollout engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.engine import RolloutEngine
from rollout.settings import (
    DtypeName,
    EngineName,
    LocalSettings,
    RolloutSettings,
    VllmSettings,
    torch_dtype,
)
from rollout.text.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from model.dense import DensePolicy
    from model.transformer import Transformer
    from rollout.dense.engine import DenseEngine
    from rollout.native.engine import NativeEngine

NATIVE_TYPES = ("deepseek_v3",)


def model_type(path: Path | str) -> str:
    """The `model_type` in a checkpoint's config.json.

    Raises:
        FileNotFoundError: no such directory, or no config.json in it.
        ValueError: a config.json that is not one.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint directory {path}")
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json, so it is not a checkpoint directory")
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a model config with a model_type: {error!r}") from error


def context_of(path: Path | str) -> int | None:
    """A checkpoint's longest sequence, tokens, where its config.json tells."""
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def context_and_vocabulary(path: Path, context: int) -> tuple[int, int]:
    """The longest sequence, at most `context` unless that is 0, and the number of token ids.

    Raises:
        ValueError: config.json tells of neither.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    most = context_of(path) or context
    if not most or "vocab_size" not in config:
        raise ValueError(f"{path}/config.json lacks max_position_embeddings or vocab_size; add them there.")
    return min(context or most, most), int(config["vocab_size"])


def open_engine(
    path: Path | str,
    engine: EngineName = "auto",
    dtype: DtypeName = "float32",
    device: str = "cpu",
    vllm: VllmSettings | None = None,
    local: LocalSettings | None = None,
) -> tuple[RolloutEngine, PreTrainedTokenizerFast | None]:
    """An engine with the checkpoint's weights, and the checkpoint's tokenizer if it has one.

    Args:
        engine: `auto` takes native for the architectures that `model/` implements, else dense.
        device: of the in-process engines; vLLM takes the device that its build is for.
        vllm: settings of that engine.
        local: settings of the in-process engines.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the native engine was asked for and the architecture is not `model/`'s, or speculation
            and the model has no MTP module.
        ModuleNotFoundError: vLLM was asked for and is not installed here.
        StaleWeights: vLLM does not compute what our own model does.
    """
    kind = model_type(path)
    if engine == "auto":
        engine = "native" if kind in NATIVE_TYPES else "dense"
    if engine == "native" and kind not in NATIVE_TYPES:
        raise ValueError(
            f"{path} is a {kind} model; engine native is for {NATIVE_TYPES[0]}, use engine dense."
        )
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    if engine == "vllm":
        from rollout.vllm.engine import VllmEngine

        return VllmEngine(path, dtype=dtype, settings=vllm), tokenizer

    # Each engine imports its own stack, so that the native one does not wait for transformers' models.
    local = local or LocalSettings()
    if engine == "native":
        import model

        net = model.load(path, dtype=torch_dtype(dtype), device=device)
        return native_engine(net, local, tokenizer), tokenizer

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would tear the caller's own lines apart
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch_dtype(dtype), device_map={"": device}
    )
    return dense_engine(dense, local, tokenizer), tokenizer


def native_engine(
    net: Transformer,
    settings: LocalSettings,
    tokenizer: PreTrainedTokenizerFast | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> NativeEngine:
    """The engine for a native model, as the settings want it.

    Raises:
        ValueError: speculation with a model that has no MTP module.
    """
    from rollout.native.engine import NativeEngine

    return NativeEngine(
        net,
        max_batch=settings.max_batch or 512,
        cache_bytes=int(settings.cache_gib * 2**30),
        speculate=settings.speculate,
        eos_token_id=eos_token_id,
        tokenizer=tokenizer,
    )


def dense_engine(
    model: PreTrainedModel,
    settings: LocalSettings,
    tokenizer: PreTrainedTokenizerFast | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> DenseEngine:
    """The engine for a transformers model, as the settings want it.

    Raises:
        ValueError: speculation was asked for.
    """
    from rollout.dense.engine import DenseEngine

    if settings.speculate:
        raise ValueError("speculate is for native models with an MTP module; this is a dense model.")
    return DenseEngine(
        model,
        max_batch=settings.max_batch or 256,
        cache_bytes=int(settings.cache_gib * 2**30),
        eos_token_id=eos_token_id,
        tokenizer=tokenizer,
    )


def engine_for(
    policy: Transformer | DensePolicy,
    tokenizer: PreTrainedTokenizerFast,
    settings: RolloutSettings | None = None,
    path: Path | None = None,
) -> RolloutEngine:
    """An engine for a policy in training.

    Args:
        policy: as loaded from `path`.
        settings: where it draws. Without any, or with an in-process engine, it draws from the trainer's own
            weights in place: nothing to sync, nothing to go stale.
        path: the policy's checkpoint, which engines with weights of their own open.

    Raises:
        ValueError: an engine that is not for this policy.
        ModuleNotFoundError: vLLM or Ray is not installed here.
        StaleWeights: vLLM does not compute what the policy does.
    """
    from model.transformer import Transformer

    settings = settings or RolloutSettings()
    native = isinstance(policy, Transformer)
    if settings.engine not in ("auto", "vllm", "native" if native else "dense"):
        raise ValueError(
            f"the policy is {'a native model' if native else 'a dense model'}, which rollout.engine = "
            f"{settings.engine!r} does not draw from; use auto or vllm."
        )
    if settings.workers:
        assert path is not None
        from rollout.pool.engine import RolloutPool

        return RolloutPool(path, settings, eos_token_id=tokenizer.eos_token_id)
    if settings.engine == "vllm":
        assert path is not None
        from rollout.vllm.engine import VllmEngine

        return VllmEngine(
            path,
            dtype=settings.dtype,
            settings=settings.vllm,
            reference=policy,
            eos_token_id=tokenizer.eos_token_id,
        )
    if isinstance(policy, Transformer):
        return native_engine(policy, settings.local, tokenizer, tokenizer.eos_token_id)
    return dense_engine(policy.network, settings.local, tokenizer, tokenizer.eos_token_id)
