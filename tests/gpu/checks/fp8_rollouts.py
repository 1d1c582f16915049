"""Engines in bf16 and FP8 beside trainers in bf16 and FP8: how far apart their log-probabilities are."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import ModelConfig, Transformer
from pipeline.train.policy import save_policy
from rollout.settings import RolloutSettings
from rollout.text.tokenizer import train_tokenizer
from tests.gpu.checks.compare import SMALL, measured, true
from tests.gpu.checks.zero import Precision, metrics, settings, stage
from tests.small import CORPUS

SUMMARY = "a step of zero, an engine in bf16 or FP8 and a trainer in bf16 or FP8: mismatch KL of each pair"
KINDS: tuple[Precision, ...] = ("bfloat16", "fp8")


def run(device: torch.device, config: ModelConfig = SMALL, **changes: Any) -> dict[str, Any]:
    """Claims: FP8 in one of the two shows, the gap stays small, and no update is skipped."""
    kls, skipped = dict[str, float](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        runs, model = Path(folder), Path(folder) / "model"
        tokenizer = train_tokenizer(CORPUS, 400)
        shape = replace(config, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        save_policy(Transformer(shape, seed=0), tokenizer, model, "r1-zero-short", "random")
        for trainer in KINDS:
            for engine in KINDS:
                how = {"prompts_per_step": 8, "group_size": 8, "max_mismatch_kl": 9.0, **changes}
                name = f"{engine}-{trainer}"
                made = settings(model, runs, name, device.type, trainer, **how)
                made = replace(made, steps=1, eval_every=0, rollout=RolloutSettings(dtype=engine))
                (line,) = metrics(stage(made))
                kls[name] = line["policy/mismatch_kl"]
                skipped += line["optim/skipped"]
    claims = [
        measured(f"engine {name.replace('-', ', trainer ')}: mismatch KL", kl, "nats")
        for name, kl in kls.items()
    ]
    one = min(kls["fp8-bfloat16"], kls["bfloat16-fp8"])
    claims += [
        measured("FP8 on one side over FP8 on both", one / kls["fp8-fp8"], "x"),
        true("FP8 on one side is at least twice as far as bf16 on both", one >= 2 * kls["bfloat16-bfloat16"]),
        true("all below 0.1 nats", max(kls.values()) < 0.1),
        true("no update skipped", skipped == 0),
    ]
    return {"kl": kls, "claims": claims}
