"""A policy on disk: a public checkpoint directory with its tokenizer, template and model card."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from model.policy import Policy
from pipeline.errors import UserError
from rollout import local
from rollout.engine import EngineDied, RolloutEngine, StaleWeights
from rollout.open import engine_for
from rollout.settings import Arithmetic, RolloutSettings
from rollout.text.tokenizer import load_tokenizer


def load_policy(path: Path, device: torch.device) -> tuple[Policy, PreTrainedTokenizerFast]:
    """The model at `path`, in training mode on `device`, with its tokenizer.
    Raises `UserError`: no readable checkpoint there."""
    with loading(path):
        return local.load_policy(path, device=device).train(), load_tokenizer(path)


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Within it, what cannot be read of the checkpoint at `path` is a `UserError` of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = str(error).partition("\n")[0]  # transformers lists all models after it
        raise UserError(f"cannot load the model at {path}: {why}") from error


def open_rollouts(
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    settings: RolloutSettings,
    path: Path,
    precision: Arithmetic | None = None,
) -> RolloutEngine:
    """The engine that generates from a policy loaded from `path` and trained in `precision`, if at all.
    Raises `UserError`: an engine that is not for it, not installed here, or wrong about it."""
    try:
        return engine_for(policy, tokenizer, settings, path, precision)
    except (ModuleNotFoundError, ValueError, EngineDied, StaleWeights) as error:
        raise UserError(str(error)) from error


def save_policy(
    policy: Policy, tokenizer: PreTrainedTokenizerFast, path: Path, template: str, story: str, **about: object
) -> None:
    """A directory that transformers loads: weights, tokenizer, a card, and the template it was trained with
    and what else there is `about` it, in pipeline.json."""
    policy.save(path)
    card = (
        f"# {story}\n\n{policy.num_parameters():,} parameters. Prompt template: `{template}`.\n"
        "Settings, data and code version: `config.toml` and `env.json` beside this directory.\n"
    )
    describe(path, tokenizer, template, card, **about)


def describe(
    path: Path, tokenizer: PreTrainedTokenizerFast, template: str, card: str, **about: object
) -> None:
    """Write what stands beside the weights: tokenizer, template and more of the training, model card."""
    tokenizer.save_pretrained(path)
    (path / "pipeline.json").write_text(json.dumps({"template": template, **about}) + "\n")
    (path / "README.md").write_text(card, encoding="utf-8")
