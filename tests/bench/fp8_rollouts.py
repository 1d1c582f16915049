"""Rollouts in FP8: how far an FP8 engine is from trainers in FP8, bf16 and fp32, and a bf16 engine likewise.

From a finished tiny base R1-Zero runs ten steps a pair, with small rounds. Compared are log-probabilities of
the sampled tokens: mismatch KL in nats a token, the largest difference, and the share of tokens whose
importance ratio the correction cuts. FP8 is emulated on a CPU: the format's rounding, not its speed.

The base is the first finished pretrain stage in the folder R1_RUNS (make r1).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

from pipeline.__main__ import main
from pipeline.errors import UserError

SUMMARY = "ten steps of RL with an engine in FP8 or bf16 and a trainer in fp8, bf16 or fp32: mismatch KL"
STEPS = 10
ENGINES = ("fp8", "bfloat16")
TRAINERS = ("fp8", "bfloat16", "float32")
SIZES = {"prompts-per-step": 4, "group-size": 8, "minibatches": 1, "eval-every": 0, "log-samples": 0}
KEPT = ("policy/mismatch_kl", "policy/mismatch_max", "policy/experts_differ", "reward/mean")


def measure(model: Path, runs: Path, engine: str, trainer: str, steps: int = STEPS) -> dict[str, Any]:
    """One run: means over its steps, the KL of each, CPU seconds."""
    argv = [
        "zero",
        "--config",
        "configs/tiny/zero.toml",
        "--runs",
        str(runs),
        "--name",
        f"{engine}-{trainer}",
    ]
    argv += ["--init-from", str(model), "--steps", str(steps), "--checkpoint-every", str(steps)]
    argv += ["--rollout.dtype", engine, "--optim.precision", trainer, "--rollout.routed-experts"]
    argv += [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    argv += ["--max-mismatch-kl", "9", "--max-idle-steps", "0", "--kl-coef", "0.001"]  # all rollouts count
    began = process_time()
    assert main(argv) == 0
    lines = (runs / f"{engine}-{trainer}" / "zero" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kls = [row["policy/mismatch_kl"] for row in rows]
    means = {name: fmean(row[name] for row in rows) for name in KEPT}
    return means | {"kl_of_each_step": kls, "cpu_s": process_time() - began}


def run() -> dict[str, Any]:
    """All pairs, one after the other."""
    root = Path(os.environ.get("R1_RUNS", "runs"))
    models = sorted(root.glob("*/pretrain/model"))
    if not models:
        raise UserError(f"{root} holds no finished chain: set R1_RUNS, or make r1 one")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as runs:
        for trainer in TRAINERS:
            found[trainer] = {engine: measure(models[0], Path(runs), engine, trainer) for engine in ENGINES}
    kl = {(engine, trainer): found[trainer][engine][KEPT[0]] for trainer in TRAINERS for engine in ENGINES}
    claims = [
        {"claim": f"engine {engine}, trainer {trainer}: mismatch KL", "value": value, "at_most": 0.1}
        | {"unit": "nats a token"}
        for (engine, trainer), value in kl.items()
    ]
    half = kl["bfloat16", "bfloat16"]
    claims += [
        {"claim": "engine fp8: KL of a bf16 trainer over an fp8 one", "at_least": 1.0}
        | {"value": kl["fp8", "bfloat16"] / kl["fp8", "fp8"]},
        {"claim": "trainer fp8: KL of a bf16 engine over an fp8 one", "at_least": 1.0}
        | {"value": kl["bfloat16", "fp8"] / kl["fp8", "fp8"]},
        {"claim": "KL of FP8 in the engine over bf16 on both sides", "at_least": 2.0}
        | {"value": kl["fp8", "bfloat16"] / half},
    ]
    return {"claims": claims, "base": models[0].parent.parent.name, "sizes": SIZES, "by_trainer": found}
