"""A policy on disk: a public checkpoint directory with its tokenizer, template and model card."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from model.policy import Policy
from pipeline.errors import UserError
from rollout import local
from rollout.engine import EngineDied, RolloutEngine, StaleWeights
from rollout.open import engine_for
from rollout.settings import RolloutSettings
from rollout.text.tokenizer import load_tokenizer


def set_up(seed: int, threads: int) -> None:
    """Seed every generator and fix what makes CPU bits reproducible."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load_policy(path: Path) -> tuple[Policy, PreTrainedTokenizerFast]:
    """The model at `path`, in training mode, with its tokenizer.

    Raises:
        UserError: no readable checkpoint there.
    """
    try:
        return local.load_policy(path).train(), load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model at {path}: {error}") from error


def open_rollouts(
    policy: Policy, tokenizer: PreTrainedTokenizerFast, settings: RolloutSettings, path: Path
) -> RolloutEngine:
    """The engine that generates from a policy loaded from `path`.

    Raises:
        UserError: an engine that is not for it, not installed here, or wrong about it.
    """
    try:
        return engine_for(policy, tokenizer, settings, path)
    except (ModuleNotFoundError, ValueError, EngineDied, StaleWeights) as error:
        raise UserError(str(error)) from error


def save_policy(
    policy: Policy, tokenizer: PreTrainedTokenizerFast, path: Path, template: str, story: str
) -> None:
    """A directory that transformers loads: weights, tokenizer, the template it was trained with, a card."""
    policy.save(path)
    card = (
        f"# {story}\n\n{policy.num_parameters():,} parameters. Prompt template: `{template}`.\n"
        "Settings, data and code version: `config.toml` and `env.json` beside this directory.\n"
    )
    describe(path, tokenizer, template, card)


def describe(path: Path, tokenizer: PreTrainedTokenizerFast, template: str, card: str) -> None:
    """Write what stands beside the weights: tokenizer, the template of training, model card."""
    tokenizer.save_pretrained(path)
    (path / "pipeline.json").write_text(json.dumps({"template": template}) + "\n")
    (path / "README.md").write_text(card, encoding="utf-8")
