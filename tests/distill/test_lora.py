"""LoRA, in an environment that has peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill.trainer import StudentTrainer
from pipeline.data.jsonl import read_log

pytest.importorskip("peft", reason="pip install peft (the extra `lora`)")
Distill = Callable[..., Path]
ADAPTED: dict[str, Any] = {"lora_rank": 4, "steps": 6, "plain_control": False}


def test_adapters_train_and_are_merged(distill: Distill, toy: Path) -> None:
    """The network's own weights change by a product of the adapters' rank, and nothing else changes."""
    folder = distill(steps=40, lora_rank=4, plain_control=False)
    losses = [row["loss/lm"] for row in read_log(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.3
    start, done = (load_file(at / "model.safetensors") for at in (toy / "start", folder / "student/model"))
    assert start.keys() == done.keys()
    moved = {name for name in start if not torch.equal(start[name], done[name])}
    assert moved and all("proj" in name for name in moved)
    assert all(torch.linalg.matrix_rank((done[n] - start[n]).double(), rtol=1e-4) <= 4 for n in moved)


def test_a_huge_adapter_changes_the_outputs(
    distill: Distill, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StudentTrainer.train

    def train(self: StudentTrainer, **more: Any) -> None:
        real(self, **more)
        for name, tensor in self.model.named_parameters():
            if "lora_B" in name:
                tensor.data.fill_(1e3)

    monkeypatch.setattr(StudentTrainer, "train", train)
    folder = distill(**ADAPTED)
    ids = torch.arange(20)[None]
    models = (AutoModelForCausalLM.from_pretrained(at) for at in (toy / "start", folder / "student/model"))
    before, after = (model(ids).logits for model in models)
    assert (before - after).abs().mean() > 0.1


def test_an_interrupted_run_with_evaluations_resumes_to_the_same_bits(distill: Distill) -> None:
    checked = ADAPTED | {"eval_rows": 30, "eval_every": 2}
    whole = distill(name="whole", **checked)

    def hook(run_dir: Any) -> None:
        log = run_dir.log

        def logged(step: int, total: int, row: dict[str, float]) -> None:
            log(step, total, row)
            run_dir.interrupted |= step == 3

        run_dir.log = logged

    with pytest.raises(KeyboardInterrupt):
        distill(name="cut", hook=hook, **checked)
    cut = distill(name="cut", resume=True, **checked)
    a, b = (load_file(folder / "student/model/model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
