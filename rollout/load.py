"""Open a checkpoint directory as a rollout engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rollout.engine import RolloutEngine
from rollout.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EngineName = Literal["auto", "native", "dense"]
DtypeName = Literal["float32", "bfloat16"]
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
    path: Path | str, engine: EngineName = "auto", dtype: DtypeName = "float32", device: str = "cpu"
) -> tuple[RolloutEngine, PreTrainedTokenizerFast | None]:
    """An engine with the checkpoint's weights, and the checkpoint's tokenizer if it has one.

    Args:
        engine: `auto` takes native for the architectures that `model/` implements, else dense.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the native engine was asked for and the architecture is not `model/`'s.
    """
    kind = model_type(path)
    if engine == "auto":
        engine = "native" if kind in NATIVE_TYPES else "dense"
    if engine == "native" and kind not in NATIVE_TYPES:
        raise ValueError(
            f"{path} is a {kind} model; engine native is for {NATIVE_TYPES[0]}, use engine dense."
        )
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None

    # Each engine imports its own stack, so that the native one does not wait for transformers' models.
    import torch

    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if engine == "native":
        import model
        from rollout.native import NativeEngine

        return NativeEngine(model.load(path, dtype=torch_dtype, device=device)), tokenizer

    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.utils import logging

    from rollout.dense import DenseEngine

    logging.disable_progress_bar()  # it would tear the caller's own lines apart
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch_dtype, device_map={"": device}
    )
    return DenseEngine(dense), tokenizer
