"""Stage `zero` as a user has it: sampled, graded, updated, killed, resumed, saved, read on the CPU.

python -m tests.gpu.checks.zero MODEL RUNS NAME DEVICE STEP      the stage, killed when step STEP is done
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from model.transformer import Transformer
from pipeline.run.directory import RunDir, open_run
from pipeline.settings.common import OptimSettings
from pipeline.settings.rollouts import GrpoSettings
from pipeline.stages import grpo
from pipeline.table import STAGES
from rollout.local import load_policy
from rollout.text.tokenizer import train_tokenizer
from tests.gpu.checks.compare import at_most, measured, relative, true
from tests.small import CORPUS, random_policy

SUMMARY = "stage zero, micro: bf16 with graphs, fp32 without; kill -9 and resume; the model on the CPU"
STEPS = 3
NEAR = 1e-5
"""Of metrics after a resume: a GPU adds in no fixed order."""
MISMATCH = 1e-6
"""Most KL between engine and trainer in fp32, nats a token."""


Precision = Literal["float32", "bfloat16", "fp8"]


def settings(
    model: Path, runs: Path, name: str, device: str, precision: Precision, **changes: Any
) -> GrpoSettings:
    """Of a run of few short rollouts."""
    few: dict[str, Any] = {"prompts_per_step": 4, "group_size": 4, "max_tokens": 24, **changes}
    return GrpoSettings(
        **few,
        name=name,
        runs=runs,
        device=device,  # type: ignore[arg-type]
        threads=1,
        init_from=str(model),
        template="r1-zero-short",
        problems=("generator:sum",),
        eval_source="generator:sum",
        pool=40,
        steps=STEPS,
        minibatches=2,
        eval_every=2,
        eval_problems=4,
        checkpoint_every=1,
        rewards={"accuracy": 1.0, "language": 1.0},
        optim=OptimSettings(lr=1e-4, precision=precision),
    )


def stage(config: GrpoSettings) -> Path:
    """Run it; its folder."""
    row = next(stage for stage in STAGES if stage.name == "zero")
    with open_run(row, config, "zero") as run_dir:
        assert run_dir is not None
        grpo.run(config, run_dir)
        return run_dir.path


def killed(config: GrpoSettings, step: int) -> None:
    """Run it in a process that a kill -9 ends when step `step` is done and nothing of it is saved."""
    command = [sys.executable, "-m", "tests.gpu.checks.zero", config.init_from, config.runs, config.name]
    done = subprocess.run(
        [*map(str, command), config.device, str(step)], capture_output=True, text=True, check=False
    )
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-2000:]}")


def kill_after(step: int) -> None:
    """This process ends so."""
    log = RunDir.log

    def logged(run_dir: RunDir, at: int, total: int, metrics: dict[str, float]) -> None:
        log(run_dir, at, total, metrics)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunDir.log = logged


def run(
    device: torch.device, kill: Callable[[GrpoSettings, int], None] = killed, **changes: Any
) -> dict[str, Any]:
    """Claims: mismatch, the same metrics after a kill and a resume, the same model on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        runs, model = Path(folder), Path(folder) / "model"
        random_policy(model, train_tokenizer(CORPUS, 400), "r1-zero-short", initializer_range=0.1)
        plain = settings(model, runs, "plain", device.type, "float32", **changes)
        whole = metrics(stage(plain))
        cut = replace(plain, name="cut")
        kill(cut, 2)
        begun = sorted(int(line["step"]) for line in metrics(runs / "cut" / "zero"))
        resumed = metrics(stage(replace(cut, resume=True)))
        half = metrics(stage(settings(model, runs, "half", device.type, "bfloat16", **changes)))
        claims = [
            at_most("fp32: mismatch KL of engine and trainer", worst(whole, "policy/mismatch_kl"), MISMATCH),
            true("a killed run has its steps so far", begun == [1, 2]),
            at_most("metrics after kill and resume, the farthest", apart(whole, resumed), NEAR),
            measured("bf16: mismatch KL of engine and trainer", worst(half, "policy/mismatch_kl"), "nats"),
            true("bf16: no update skipped", worst(half, "optim/skipped") == 0),
        ]
        left = runs / "plain" / "zero" / "model"
        ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            here, there = Transformer.load(left), load_policy(left, device=device)
            claims.append(
                at_most(
                    "its logits on the CPU", relative(there.logits(ids.to(device)), here.logits(ids)), 1e-4
                )
            )
    return {"steps": whole, "half": half, "claims": claims}


def metrics(path: Path) -> list[dict[str, float]]:
    """What a run has logged."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def worst(lines: list[dict[str, float]], key: str) -> float:
    """Largest value of a metric."""
    return max(abs(line[key]) for line in lines)


def apart(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Largest relative difference of any metric but times and what depends on them; infinite if some lack."""
    if [line["step"] for line in one] != [line["step"] for line in other]:
        return math.inf
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        for key in a.keys() | b.keys():
            if not key.startswith(("time/", "memory/")):
                x, y = a.get(key, math.inf), b.get(key, math.inf)
                largest = max(largest, abs(x - y) / max(abs(x), 1e-3) if x != y else 0.0)
    return largest


if __name__ == "__main__":
    model, runs, name, device, step = sys.argv[1:]
    kill_after(int(step))
    stage(settings(Path(model), Path(runs), name, device, "float32"))
