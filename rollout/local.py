"""Policies loaded from checkpoints, and the engines that generate from a policy in this process."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from model.dense import DensePolicy
from model.policy import Policy
from model.scale import fp8
from model.transformer import Transformer
from rollout.checkpoint import NATIVE_TYPES, model_type
from rollout.dense.engine import DenseEngine
from rollout.native.engine import NativeEngine
from rollout.settings import RolloutSettings
from rollout.types import Eos
from rollout.weights import DTYPES, InPlaceEngine, device_of

LOCAL: dict[str, Callable[..., InPlaceEngine]] = {"native": NativeEngine, "dense": DenseEngine}
"""By `Policy.engine`."""


def engine_name(path: Path | str, engine: str = "auto") -> str:
    """`engine`, or for `auto` the engine in this process that suits checkpoint `path`.
    Raises `FileNotFoundError` or `ValueError`: no checkpoint there, or one that the native engine does not
    implement."""
    kind = model_type(path)
    if engine == "native" and kind not in NATIVE_TYPES:
        (native,) = NATIVE_TYPES
        raise ValueError(f"{path} is a {kind} model; engine native is for {native}, use engine dense.")
    return engine if engine != "auto" else "native" if kind in NATIVE_TYPES else "dense"


def load_policy(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    engine: str = "auto",
) -> Policy:
    """The model of a checkpoint, as the class that `engine` generates from.

    Raises:
        FileNotFoundError, ValueError: as `engine_name`.
        OSError, ValueError: tensors that cannot be read, or a config.json that describes no model.
    """
    native = engine_name(path, engine) == "native"
    try:
        return (Transformer if native else DensePolicy).load(path, dtype, device)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a value of the wrong kind
        raise ValueError(f"{path}/config.json describes no model that can be built: {error!r}") from error


def open_local(
    path: Path | str,
    settings: RolloutSettings,
    *,
    device: str = "cpu",
    policy: Policy | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    eos_token_id: Eos = None,
) -> InPlaceEngine:
    """The engine of `policy`; without one, of the policy that is loaded from `path` for it.

    Args:
        settings: `local`; `dtype`, where it is fp8; `engine` and `dtype` of the policy to load, as `device`.
        tokenizer: reads stop strings.
        eos_token_id: ends a completion; None = the model's.

    Raises:
        ValueError: speculation with a model that has no MTP module, or a device without FP8 arithmetic.
    """
    if policy is None:
        name = "float32" if settings.dtype == "auto" else settings.dtype
        policy = load_policy(path, DTYPES[name], device, settings.engine)
    if settings.dtype == "fp8":
        if not fp8.supported(device_of(policy)):
            raise ValueError(f"{device_of(policy)} has no FP8 arithmetic; set rollout.dtype to bfloat16")
        fp8.convert(policy)
    local = settings.local
    return LOCAL[policy.engine](
        policy,
        **({"max_batch": local.max_batch} if local.max_batch else {}),
        cache_bytes=int(local.cache_gib * 2**30),
        speculate=local.speculate,
        **({"record_routes": True} if settings.routed_experts else {}),
        eos_token_id=eos_token_id,
        tokenizer=tokenizer,
    )
