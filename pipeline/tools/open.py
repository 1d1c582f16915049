"""What the commands that sample from a checkpoint share: how it is opened, and errors that name it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.errors import UserError
from pipeline.run.files import read_json
from pipeline.settings.tools import ModelSettings
from pipeline.train.place import device_named
from rollout.endpoint.engine import byte_tokenizer
from rollout.engine import EngineDied, RolloutEngine, StaleWeights
from rollout.open import ENGINES, open_engine
from rollout.settings import EndpointSettings, EngineName, RolloutSettings
from rollout.text.templates import template_named

ERRORS = (FileNotFoundError, ModuleNotFoundError, ValueError, FloatingPointError, StaleWeights, EngineDied)
"""What an engine refuses (a model, a setting) or fails at (logits that are not finite, a crash)."""


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Within it, `ERRORS` become a `UserError` that begins with `path`."""
    try:
        yield
    except ERRORS as error:
        raise UserError(f"{path}: {error}") from error


def check_model(path: Path, engine: EngineName = "auto") -> None:
    """Raise `UserError` where there is no checkpoint: known before anything is imported or read for long."""
    if engine != "endpoint" and not (path / "config.json").is_file():
        raise UserError(f"no model at {path}: no config.json there; --model needs a checkpoint")


def open_model(
    config: ModelSettings, workers: int = 0, task_prompts: int = 0
) -> tuple[RolloutEngine, Tokenizer | None]:
    """The engine and, if it has one, the tokenizer of a model, or a pool of `workers`.
    Raises `UserError`: no GPU where one was asked for, no such model, an engine that is not for it or not
    installed here, or one that is wrong."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = str(device_named(config.device))
    if config.engine == "endpoint":
        return open_served(str(config.model), config.endpoint)
    with naming(config.model):
        own = config.engine, config.dtype, device, config.vllm, config.local
        return open_engine(config.model, *own, workers, config.threads, task_prompts)


def open_served(model: str, settings: EndpointSettings) -> tuple[RolloutEngine, Tokenizer]:
    """The engine of a served model, and what stands for its tokenizer.
    Raises `UserError`: no address, no API that answers there, or no client installed here."""
    with naming(model):
        return ENGINES["endpoint"](model, RolloutSettings(endpoint=settings)), byte_tokenizer()


def open_speaker(
    config: ModelSettings, workers: int = 0, task_prompts: int = 0
) -> tuple[RolloutEngine, Tokenizer]:
    """As `open_model`, of a model that must have a tokenizer."""
    engine, tokenizer = open_model(config, workers, task_prompts)
    if tokenizer is None:
        engine.close()
        raise UserError(f"{config.model} has no tokenizer.json; copy its base model's there")
    return engine, tokenizer


def trained_template(model: Path) -> str | None:
    """The prompt template that a model was trained with, where its pipeline.json has it.
    Raises `UserError`: a pipeline.json that does not name a template."""
    about = model / "pipeline.json"
    known = read_json(about)
    template: str | None = known.get("template") or known.get("r1_template")
    try:
        return template and template_named(template).name
    except (ValueError, TypeError) as error:
        raise UserError(f"{about} does not name a prompt template: {error}; remove it or mend it") from error
