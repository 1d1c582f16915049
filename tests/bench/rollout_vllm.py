"""The native engine against vLLM's CPU build: the same tiny MoE checkpoint, prompts, precision, one thread.

Both run through `python -m pipeline generate`, each in its own environment, in turn; its own figure, without
loading and compiling, is compared. Needs .venv-vllm (`make test-vllm` makes it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import model
from model import TINY
from tests.bench._rollout import ragged_prompts
from tests.bench.measure import Timing

SUMMARY = "tokens a second of the native engine, against vLLM on the CPU"
ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
ROUNDS = 3
PROMPTS, SAMPLES, NEW = 32, 8, 128


def generate(python: Path, engine: str, dtype: str, folder: Path) -> dict[str, Any]:
    """The command's own summary."""
    flags = {
        "--engine": engine, "--dtype": dtype, "--model": folder / "model", "--prompts": folder / "in.jsonl",
        "--out": folder / f"{engine}.jsonl", "--samples": SAMPLES, "--max-tokens": NEW, "--threads": 1,
    }  # fmt: skip
    command = [python, "-m", "pipeline", "generate", "--ignore-eos"]
    command += [word for pair in flags.items() for word in pair]
    env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine} ended with {done.returncode}: {done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def run() -> dict[str, Any]:
    """Tokens a second in fp32 and in bf16."""
    if not VLLM_PYTHON.exists():
        raise SystemExit(
            f"error: this benchmark needs {VLLM_PYTHON.parent.parent.name}: run `make test-vllm`"
        )
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save(model.Transformer(TINY, seed=0), folder / "model")
        rows = [{"token_ids": p.token_ids} for p in ragged_prompts(PROMPTS, TINY.vocab_size, seed=0)]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for _ in range(ROUNDS):
            for dtype in ("float32", "bfloat16"):
                for engine, python in (("native", Path(sys.executable)), ("vllm", VLLM_PYTHON)):
                    summary = generate(python, engine, dtype, folder)
                    assert summary["tokens"] == PROMPTS * SAMPLES * NEW
                    rates.setdefault(f"{engine} {dtype}", []).append(summary["tokens_per_s"])
    costs = {name: Timing(tuple(1 / rate for rate in found)) for name, found in rates.items()}
    claims = [
        {"claim": f"against vLLM, {dtype}", "value": costs[f"native {dtype}"].ratio(costs[f"vllm {dtype}"])}
        | {"at_least": 1.5}
        for dtype in ("float32", "bfloat16")
    ]
    return {
        "claims": claims,
        "tokens_per_s": {name: 1 / cost.median for name, cost in costs.items()},
        "workload": {"prompts": PROMPTS, "samples": SAMPLES, "new tokens": NEW},
    }
