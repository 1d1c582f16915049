"""What the commands that draw from a checkpoint share: which model, and how it is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import UserError
from rollout.engine import StaleWeights
from rollout.settings import DtypeName, EngineName, LocalSettings, VllmSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rollout.engine import RolloutEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which model, and how it is opened."""

    model: Path
    """Checkpoint directory: config.json, safetensors, and for text a tokenizer."""
    engine: EngineName = "auto"
    """auto = native for DeepSeek-V3 checkpoints, dense (transformers) for all others; vllm in .venv-vllm."""
    dtype: DtypeName = "float32"
    """Of the weights and the arithmetic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one. vLLM takes what its build is for."""
    threads: int = 0
    """CPU threads for torch; 0 = torch's own choice."""
    local: LocalSettings = field(default_factory=LocalSettings)
    """Settings of the native and the dense engine."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """vLLM's own settings."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads={self.threads} must be at least 0.")


def open_model(config: ModelSettings) -> tuple[RolloutEngine, PreTrainedTokenizerFast | None]:
    """The engine and, if it has one, the tokenizer of a model.

    Raises:
        UserError: no such model, an engine that is not for it or not installed here, or one that is wrong.
    """
    import torch

    from rollout.open import open_engine

    if config.threads:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return open_engine(config.model, config.engine, config.dtype, device, config.vllm, config.local)
    except (FileNotFoundError, ModuleNotFoundError, ValueError, StaleWeights) as error:
        raise UserError(f"{config.model}: {error}") from error


def open_speaker(config: ModelSettings) -> tuple[RolloutEngine, PreTrainedTokenizerFast]:
    """As `open_model`, of a model that must have a tokenizer."""
    engine, tokenizer = open_model(config)
    if tokenizer is None:
        engine.close()
        raise UserError(f"{config.model} has no tokenizer.json; copy its base model's there")
    return engine, tokenizer


def trained_template(model: Path) -> str | None:
    """The prompt template that a model was trained with, where its pipeline.json tells."""
    about = model / "pipeline.json"
    known = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    template: str | None = known.get("template") or known.get("r1_template")
    return template
