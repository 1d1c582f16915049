"""The preset for one 80 GB GPU: every stage runs, here on a tiny random model of its architecture, and by
arithmetic all of it fits. docs/gpu.md shows that arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.__main__ import main
from pipeline.data.corpus import Row
from pipeline.run.metrics import GLOSSARY, explained
from tests.conftest import ROOT

PRESET = ROOT / "configs/qwen2.5-1.5b"
TRACE = "<think>\nOne and one.\n</think>\n\nThe sum is $\\boxed{2}$."
RL = (
    "--problems generator:sum --pool 8 --eval-source generator:sum --eval-problems 2 --steps 2 --group-size 2"
    " --prompts-per-step 2 --max-tokens 6 --micro-tokens 256 --rollout.engine auto"
)
SFT = "--batch-tokens 1024 --max-length 512 --micro-tokens 256 --epochs 1"
FLAGS = {
    "zero": f"--init-from {{base}} {RL}",
    "sft": f"--init-from {{base}} --corpus {{traces}} --count 3 {SFT}",
    "grpo": RL,
    "reject": "--problems generator:sum --pool 4 --samples 2 --max-tokens 6 --rollout.engine auto",
    "sft2": f"--init-from {{base}} {SFT}",
    "grpo2": RL,
    "distill": "--init-from {base} --max-length 256 --tokens-per-step 512 --micro-batches 2 --steps 2",
    "eval": "--models base={base} zero=zero dev1=sft dev2=grpo dev3=sft2 r1=grpo2 student=distill/student"
    " --benchmarks sums=generator:sum --heldout-count 2 --samples 1 --completions 4 --max-tokens 6 --engine auto",
    "report": "--transcript-models base r1",
}
"""Sizes, sources and engine of a CPU, the rest as the preset has it; in the order of the chain."""


def qwen2(folder: Path, tokenizer) -> Path:
    """A random model of Qwen2.5's architecture, as the hub has one."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_stage_of_the_preset_runs_on_a_cpu(tmp_path, tokenizer, monkeypatch):
    assert [file.stem for file in sorted(PRESET.glob("*.toml"))] == sorted(FLAGS)
    base = qwen2(tmp_path / "base", tokenizer)
    traces = tmp_path / "traces.jsonl"
    rows = [
        {"problem": f"{n}+1?", "generations": [TRACE], "correctness_math_verify": [True]} for n in range(5)
    ]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = Row("a", "1+1?", "<think>\n1+1=2\n</think>\n<answer>2</answer>", "2", source="made")
    monkeypatch.setattr("pipeline.stages.reject.keepers", lambda group, least: [kept])  # nothing right here
    for stage, flags in FLAGS.items():
        argv = [
            stage,
            "--config",
            f"{PRESET}/{stage}.toml",
            "--runs",
            str(tmp_path / "runs"),
            "--threads",
            "1",
        ]
        assert main([*argv, *flags.format(base=base, traces=traces).split()]) == 0, stage
        folder = tmp_path / "runs/qwen2.5-1.5b" / stage
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert set(map(explained, row)) - {"step"} <= set(GLOSSARY)
            if stage in ("zero", "grpo", "grpo2"):
                assert row["policy/mismatch_kl"] < 0.01 and row["time/trained_tokens_per_s"] > 0
        if (folder / "model").exists():
            config = json.loads((folder / "model/config.json").read_text())
            assert config["model_type"] == "qwen2" and config["dtype"] == "bfloat16"
    summary = json.loads((tmp_path / "runs/qwen2.5-1.5b/summary.json").read_text())
    assert set(summary["models"]) == {"base", "zero", "dev1", "dev2", "dev3", "r1", "student"}
    assert not summary["not_made"] and not summary["not_scored"]
