"""TRL's and Trainer's losses and TRL's collator against loops in float64, for logits of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM as Models
from transformers import AutoTokenizer, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig
from trl import SFTTrainer

from distill.batches import IGNORE
from distill.trainer import Job, StudentTrainer, arguments
from pipeline.settings.distill import DistillSettings, StudentOptimSettings
from rollout.text.tokenizer import encode_example

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 0,
    "initializer_range": 0.4,
}  # fmt: skip
NETWORKS = {
    "llama": LlamaConfig(**SIZES),
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0),
}
LENGTHS = [(2, 3), (1, 7), (5, 1), (3, 4), (2, 9)]
"""Of prompts and completions; pad and eos are one token, which ends each completion."""


def rows() -> list[tuple[list[int], list[int]]]:
    """Random ids, an eos in each prompt and at each end."""
    rng = torch.Generator().manual_seed(0)
    some = [torch.randint(2, 300, (p + c,), generator=rng).tolist() for p, c in LENGTHS]
    return [([1, *ids[1:p]], [*ids[p:-1], 1]) for ids, (p, _) in zip(some, LENGTHS, strict=True)]


def trainer(name: str, folder: Path, batches: list[list[int]], accumulate: int, toy: Path) -> StudentTrainer:
    torch.manual_seed(0)
    net = Models.from_config(NETWORKS[name]).train()
    columns = {
        "input_ids": [prompt + completion for prompt, completion in rows()],
        "labels": [[IGNORE] * len(prompt) + completion for prompt, completion in rows()],
    }
    lengths = [len(ids) for ids in columns["input_ids"]]
    optim = StudentOptimSettings(lr=1e-3)
    job = Job("student", "r1", Dataset.from_dict(columns), lengths, batches, [], accumulate, optim)
    tokenizer = AutoTokenizer.from_pretrained(toy / "start")
    tokenizer.pad_token = tokenizer.eos_token
    args = arguments(job, DistillSettings(), folder, torch.device("cpu"))
    return StudentTrainer(job, model=net, args=args, processing_class=tokenizer)


def by_loop(net: Any) -> tuple[float, torch.Tensor]:
    """Mean over all completion tokens of the model's own logits, float64; the gradient of the embedding."""
    net = net.double()
    net.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, completion in rows():
        logits = type(net).forward(net, torch.tensor([prompt + completion])).logits[0].double()
        for i, token in enumerate(completion):
            scores = logits[len(prompt) + i - 1]
            total = total + scores.exp().sum().log() - scores[token]
            count += 1
    (total / count).backward()
    return float(total.detach() / count), net.get_input_embeddings().weight.grad


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4]], [[0], [4, 1], [3, 2]]], ids=["whole", "in parts"])
@pytest.mark.parametrize("loss", [StudentTrainer.compute_loss, SFTTrainer.compute_loss], ids=["cpu", "trl"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_updates_loss_is_the_mean_over_its_completion_tokens(
    name: str, loss: Callable[..., torch.Tensor], batches: list[list[int]], tmp_path: Path, toy: Path
) -> None:
    """Own scale and cap of the logits, eos learned where pad == eos, and parts that weigh by their tokens."""
    made = trainer(name, tmp_path, batches, len(batches), toy)
    parts, items = made.get_batch_samples(iter(made.get_train_dataloader()), len(batches), "cpu")
    assert items == sum(completion for _, completion in LENGTHS)
    total = 0.0
    for inputs in parts:
        part = loss(made, made.model, dict(inputs), num_items_in_batch=items)
        part.backward()
        total += float(part.detach())
    grad = made.model.get_input_embeddings().weight.grad.clone()
    want, slope = by_loop(made.model)
    assert total == pytest.approx(want, rel=2e-6)
    assert math.isclose(float((grad - slope).norm() / slope.norm()), 0, abs_tol=1e-4)


def test_the_heldout_loss_is_the_mean_over_tokens_and_decides(
    distill: Callable[..., Path], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop over the best model's held-out rows, which are whole questions and never trained on."""
    import json

    from pipeline.data.jsonl import read_log

    seen: list[StudentTrainer] = []
    begun = StudentTrainer.train
    monkeypatch.setattr(
        StudentTrainer, "train", lambda self, **more: (seen.append(self), begun(self, **more))
    )
    folder = distill(
        steps=12, eval_rows=30, eval_every=4, optim=StudentOptimSettings(lr=0.05, warmup_steps=1)
    )
    losses = [row["heldout/loss"] for row in read_log(folder / "metrics.jsonl") if "heldout/loss" in row]
    assert len(losses) == 6
    questions: dict[str, set[bool]] = {}
    lines = [json.loads(line) for line in (toy / "corpus.jsonl").read_text().splitlines()]
    for job, label, template, own in (
        (seen[0].job, "student", "r1", losses[:3]),
        (seen[1].job, "plain", "plain", losses[3:]),
    ):
        held = {row for batch in job.checks for row in batch}
        taught = {row for batch in job.batches for row in batch}
        assert len(held) >= 30 and not held & taught and len(taught) > 100
        for i, line in enumerate(lines):
            questions.setdefault(line["question"], set()).add(i in held)
        tokenizer = AutoTokenizer.from_pretrained(toy / "start")
        net, total, count = Models.from_pretrained(folder / label / "model").double(), 0.0, 0
        for i in held:
            text = lines[i]["completion"] if label == "student" else f"<answer>{lines[i]['answer']}</answer>"
            prompt, completion = encode_example(tokenizer, lines[i]["question"], template, text)
            with torch.no_grad():
                scores = net(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            for at, token in enumerate(completion, len(prompt)):
                total, count = total - float(scores[at - 1, token]), count + 1
        assert total / count == pytest.approx(min(own), rel=1e-5)
    assert all(len(sides) == 1 for sides in questions.values())
