"""A policy on disk: a public checkpoint directory with its tokenizer, template and model card."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

import model
from model.dense import DensePolicy, load_dense, save_dense
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.train.learner import Policy
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
    """The model at `path`, native or dense by its config.json, in training mode, with its tokenizer.

    Raises:
        UserError: no readable checkpoint there.
    """
    try:
        kind = json.loads((path / "config.json").read_text()).get("model_type")
        policy: Policy = model.load(path) if kind == "deepseek_v3" else load_dense(path, torch.float32)
        return policy.train(), load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model at {path}: {error}") from error


def save_policy(
    policy: Policy, tokenizer: PreTrainedTokenizerFast, path: Path, template: str, story: str
) -> None:
    """A directory that transformers loads: weights, tokenizer, the template it was trained with, a card."""
    if isinstance(policy, Transformer):
        model.save(policy, path)
    else:
        assert isinstance(policy, DensePolicy)
        save_dense(policy, path)
    tokenizer.save_pretrained(path)
    (path / "pipeline.json").write_text(json.dumps({"template": template}) + "\n")
    (path / "README.md").write_text(
        f"# {story}\n\n{policy.num_parameters():,} parameters. Prompt template: `{template}`.\n"
        "Settings, data and code version: `config.toml` and `env.json` beside this directory.\n"
    )
