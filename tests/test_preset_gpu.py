"""The preset for one 80 GB GPU: every stage runs, here on a tiny random model of its architecture, and by
arithmetic all of it fits. docs/gpu.md shows that arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.sizes.flops import shape
from pipeline.__main__ import main
from pipeline.arguments import load
from pipeline.data.corpus import Row
from pipeline.run.metrics import GLOSSARY, explained
from pipeline.settings.common import OptimSettings
from pipeline.table import STAGES
from pipeline.train.memory import Need
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
    "on_policy": f"--init-from {{base}} {RL}",
    "distill": "--init-from {base} --max-length 256 --tokens-per-step 512 --micro-batches 2 --steps 2",
    "eval": "--models base={base} zero=zero dev1=sft dev2=grpo dev3=sft2 r1=grpo2 student=distill/student"
    " --benchmarks sums=generator:sum --heldout-count 2 --samples 1 --max-tokens 6"
    " --engine auto",
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
            *([] if stage == "report" else ["--threads", "1"]),
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


# ---- memory

GB = 1e9
H100 = 81_559 * 2**20
"""Bytes of an H100 of 80 GB, as its driver reports them."""
ON_TOP = 8 * GB
"""For what is not in the arithmetic, as docs/gpu.md states it."""
SHARED = {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
QWEN_1_5B = Qwen2Config(
    hidden_size=1_536, intermediate_size=8_960, num_hidden_layers=28, num_attention_heads=12, **SHARED
)
QWEN_0_5B = Qwen2Config(
    hidden_size=896, intermediate_size=4_864, num_hidden_layers=24, num_attention_heads=14, **SHARED
)
"""As the hub's config.json files have them."""


def settings(stage: str, *flags: str):
    return load(next(s for s in STAGES if s.name == stage), PRESET / f"{stage}.toml", list(flags))


def columns(parts: dict[str, int], training: float, generating: float) -> list[float]:
    """A row of the table, GB."""
    kinds = ("gradients", "moments", "reference", "activations", "vLLM")
    found = [parts["weights"] + parts["masters"], *(parts[kind] for kind in kinds)]
    return [*found, training + ON_TOP if training else 0, generating + ON_TOP if generating else 0]


def trained(config, shape, longest: int, gpu: int = H100) -> list[float]:
    """The row of a stage with our own learner. A sequence of `longest` tokens may be a micro-batch."""
    rollout = getattr(config, "rollout", None)
    need = Need(shape, config.optim, max(config.micro_tokens, longest), bool(rollout))
    need = need.beside(rollout, gpu, 0) if rollout else need
    parts = need.parts()
    training = need.total() - parts["vLLM"]
    if not rollout:
        return columns(parts, training, 0)
    generating = training - parts["gradients"] - parts["activations"] + need.vllm
    assert need.sleeps and need.total() == max(training, generating)
    return columns(parts | {"vLLM": need.vllm}, training, generating)


def sampled(config, vllm, itemsize: int) -> list[float]:
    """The row of a stage that samples alone: our own copy of the model lies beside vLLM."""
    weights, share = itemsize * shape(QWEN_1_5B).parameters.total, int(vllm.gpu_memory * H100)
    parts = dict.fromkeys(("masters", "gradients", "moments", "reference", "activations"), 0)
    return columns(parts | {"weights": weights, "vLLM": share}, 0, weights + share)


def table(heading: str) -> dict[str, list[str]]:
    """The first table below a heading of docs/gpu.md: the cells of each row by the row's first."""
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8").partition(f"# {heading}\n")[2]
    lines = [line for line in text.partition("\n#")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in rows}


def test_the_shapes_are_the_published_ones():
    assert (
        shape(QWEN_1_5B).parameters.total == 1_543_714_304
        and shape(QWEN_0_5B).parameters.total == 494_032_768
    )


def test_every_stage_fits_an_80_gb_gpu_and_the_page_shows_it():
    rows = {}
    for stage in ("zero", "grpo", "grpo2"):
        config = settings(stage)
        assert config.max_tokens < config.rollout.vllm.context
        rows[stage] = trained(config, QWEN_1_5B, config.rollout.vllm.context)
    for stage in ("sft", "sft2"):
        rows[stage] = trained(config := settings(stage), QWEN_1_5B, config.max_length)
    rows["reject"] = sampled(settings("reject"), settings("reject").rollout.vllm, 4)
    rows["eval"] = sampled(settings("eval"), settings("eval").vllm, 2)
    distill = settings("distill")
    most = distill.tokens_per_step // distill.micro_batches
    student = Need(QWEN_0_5B, OptimSettings(recompute=distill.recompute), most)  # fp32: an upper bound
    rows["distill"] = columns(student.parts(), student.total(), 0)
    assert max(max(row[-2:]) for row in rows.values()) < 75 * GB
    got = {stage: [float(cell) for cell in cells] for stage, cells in table("Memory").items()}
    assert got == {stage: [round(n / GB, 1) for n in row] for stage, row in rows.items()}


def test_the_changes_for_smaller_gpus_fit_them():
    for gpu, (flags, *cells) in table("Smaller GPUs").items():
        size, config = float(gpu.split()[0]) * GB, settings("zero", *flags.strip("`").split())
        shape = QWEN_0_5B if config.init_from.endswith("0.5B") else QWEN_1_5B
        training, generating = trained(config, shape, config.rollout.vllm.context, int(size))[-2:]
        assert [float(cell) for cell in cells] == [round(training / GB, 1), round(generating / GB, 1)]
        assert max(training, generating) < size
