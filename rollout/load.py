"""Open a checkpoint directory as a rollout engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.engine import RolloutEngine
from rollout.settings import DtypeName, EngineName, RolloutSettings, VllmSettings
from rollout.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.dense import DensePolicy
    from model.transformer import Transformer

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


def open_engine(
    path: Path | str,
    engine: EngineName = "auto",
    dtype: DtypeName = "float32",
    device: str = "cpu",
    vllm: VllmSettings | None = None,
) -> tuple[RolloutEngine, PreTrainedTokenizerFast | None]:
    """An engine with the checkpoint's weights, and the checkpoint's tokenizer if it has one.

    Args:
        engine: `auto` takes native for the architectures that `model/` implements, else dense.
        device: of the in-process engines; vLLM takes the device that its build is for.
        vllm: settings of that engine.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the native engine was asked for and the architecture is not `model/`'s.
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
        from rollout.vllm import VllmEngine

        return VllmEngine(path, dtype=dtype, settings=vllm), tokenizer

    # Each engine imports its own stack, so that the native one does not wait for transformers' models.
    import torch

    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if engine == "native":
        import model
        from rollout.native import NativeEngine

        net = model.load(path, dtype=torch_dtype, device=device)
        return NativeEngine(net, tokenizer=tokenizer), tokenizer

    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.utils import logging

    from rollout.dense import DenseEngine

    logging.disable_progress_bar()  # it would tear the caller's own lines apart
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch_dtype, device_map={"": device}
    )
    return DenseEngine(dense, tokenizer=tokenizer), tokenizer


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
        from rollout.workers import RolloutPool

        return RolloutPool(path, settings, eos_token_id=tokenizer.eos_token_id)
    if settings.engine == "vllm":
        assert path is not None
        from rollout.vllm import VllmEngine

        return VllmEngine(
            path,
            dtype=settings.dtype,
            settings=settings.vllm,
            reference=policy,
            eos_token_id=tokenizer.eos_token_id,
        )
    if isinstance(policy, Transformer):
        from rollout.native import NativeEngine

        return NativeEngine(policy, eos_token_id=tokenizer.eos_token_id, tokenizer=tokenizer)
    from rollout.dense import DenseEngine

    return DenseEngine(policy.network, eos_token_id=tokenizer.eos_token_id, tokenizer=tokenizer)
