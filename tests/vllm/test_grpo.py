"""GRPO, generate and evaluate through the real vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from networks import MOE, network

from pipeline.__main__ import main
from pipeline.data.corpus import Row
from pipeline.train.policy import save_policy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    """A random policy with its tokenizer, in the shape of a stage's model."""
    folder = tmp_path_factory.mktemp("policy")
    save_policy(network(MOE, seed=0), tokenizer, folder, "r1-zero-short", "random")
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-8), ("bfloat16", 0.05)])
def test_grpo_through_vllm_logs_the_mismatch(policy, tmp_path, dtype, bound):
    """Three steps, weights in place after each; fp32 differs from the trainer by rounding alone."""
    argv = ["zero", "--config", "configs/micro/zero.toml", "--runs", tmp_path, "--threads", 1, "--steps", 3]
    argv += ["--init-from", policy, "--rollout.engine", "vllm", "--rollout.dtype", dtype]
    assert main([*map(str, argv), "--optim.lr", "1e-3", "--rewards.language", "1"]) == 0
    logged = rows(tmp_path / "micro/zero/metrics.jsonl")
    assert [row["rollout/version"] for row in logged] == [0, 1, 2]
    assert all(0 <= row["policy/mismatch_kl"] < bound for row in logged)
    assert any(row["policy/mismatch_kl"] > 0 and row["optim/grad_norm"] > 0 for row in logged)


def test_generate_and_its_last_line(policy, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"token_ids": [5, 6, 7]}\n{"prompt": "User: 3+4=?"}\n')
    out = {}
    for engine in ("vllm", "native"):
        argv = ["generate", "--model", policy, "--prompts", tmp_path / "in.jsonl", "--engine", engine]
        argv += ["--out", tmp_path / engine, "--samples", 2, "--temperature", 0, "--max-tokens", 12]
        assert main(list(map(str, argv))) == 0
        summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert summary["engine"] == engine and summary["rollouts"] == 4
        out[engine] = [(r["index"], r["sample"], r["token_ids"], r["text"]) for r in rows(tmp_path / engine)]
    assert out["vllm"] == out["native"]


def test_reject_samples_through_vllm(policy, tmp_path, monkeypatch):
    """Greedy completions of vLLM's workers (two copies of the engine) are those of the native engine."""
    kept = Row("a", "1+1?", "<think>1+1=2</think><answer>2</answer>", "2", "en", "math", "made")
    monkeypatch.setattr("pipeline.stages.reject.keepers", lambda group, least: [kept])
    texts = {}
    for name, flags in {
        "native": [],
        "vllm": ["--rollout.engine", "vllm"],
        "copies": ["--rollout.engine", "vllm", "--rollout.vllm.data-parallel", 2],
    }.items():
        argv = [
            "reject",
            "--config",
            "configs/micro/reject.toml",
            "--runs",
            tmp_path,
            "--name",
            name,
            "--pool",
            8,
        ]
        argv += ["--init-from", policy, "--threads", 1, "--max-tokens", 12, "--temperature", 0, *flags]
        assert main(list(map(str, argv))) == 0
        texts[name] = [(row["id"], row["text"]) for row in rows(tmp_path / name / "reject/samples.jsonl")]
    assert texts["vllm"] == texts["copies"] == texts["native"]
