"""RL with the Python tool on finished tiny chains: that the policy learns to use it, and needs it.

From the base of a finished chain, with three seeds: the preset `tool`'s cold start, a quarter of whose traces
use the tool while the others guess; its RL; and, as the control, the same RL from the same cold start without
the environment. All are evaluated on the same held-out products, as they were trained: greedy, and with four
samples a question at temperature 1. A rollout uses the tool where the environment wrote an observation.

The chains are the runs in the folder R1_RUNS (make r1). What was made of each is kept in its bench-tool, so
that a benchmark that was killed goes on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.__main__ import main
from pipeline.run.files import read_toml
from tests.bench.measure import finished_chains

SUMMARY = "RL with a Python tool from a cold start that mostly guesses, and without the tool; three seeds"
SEEDS, QUESTIONS, SAMPLES = 3, 320, 4
TOOL = ("--environment", "python")
ROUTINES = {"greedy": ("--temperature", "0"), "sampled": ("--temperature", "1", "--samples", str(SAMPLES))}


def called(kept: Path, *argv: object) -> float:
    """CPU seconds of a command, its children's included; once it is done, those of then."""
    if not kept.exists():
        began = sum(os.times()[:4])
        assert main([str(arg) for arg in argv]) == 0
        kept.write_text(json.dumps(sum(os.times()[:4]) - began))
    return float(json.loads(kept.read_text()))


def stage(folder: Path, name: str, seed: int, kind: str, *flags: object) -> float:
    """Make a stage of the preset; its CPU seconds."""
    argv = [kind, "--config", f"configs/tool/{kind}.toml", "--runs", folder, "--name", name, "--seed", seed]
    resumed = ["--resume"] if (folder / name / kind).exists() else []
    return called(folder / f"{name}-{kind}.cpu", *argv, *flags, *resumed)


def scores(folder: Path, name: str, model: Path, *flags: str) -> dict[str, Any]:
    """Held-out accuracy of a model, with its 95 % interval, and the share of completions with the tool."""
    found = {}
    for how, sampling in ROUTINES.items():
        out = folder / f"{name}-{how}"
        argv = ["evaluate", "--model", model, "--benchmark", "generator:tool", "--limit", QUESTIONS]
        argv += ["--out", out, "--max-tokens", 96, "--top-p", 1, "--threads", 1, *sampling, *flags]
        called(folder / f"{name}-{how}.cpu", *argv)
        told = json.loads((out / "scores.json").read_text())
        rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
        used = fmean("turns" in row for row in rows)
        found[how] = {"pass@1": told["pass@1"], "interval": told["interval"], "uses_the_tool": used}
    return found


def curve(run: Path, key: str) -> list[float]:
    """A metric, step by step, of the steps that have it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [round(row[key], 4) for row in rows if key in row]


def measured(folder: Path, name: str, base: Path) -> dict[str, Any]:
    """Everything of one seed, from the model `base`."""
    seed, control = int(read_toml(base.parent / "config.toml")["seed"]), f"{name}-control"
    cold = folder / name / "sft" / "model"
    cpu = {"cold_start": stage(folder, name, seed, "sft", "--init-from", base)}
    cpu["rl"] = stage(folder, name, seed, "grpo")
    cpu["control"] = stage(folder, control, seed, "grpo", "--init-from", cold, "--environment", "")
    return {
        "seed": seed,
        "cold_start": scores(folder, f"{name}-cold", cold, *TOOL),
        "rl": scores(folder, f"{name}-rl", folder / name / "grpo" / "model", *TOOL),
        "control": scores(folder, f"{name}-without", folder / control / "grpo" / "model"),
        "steps": {
            key: curve(folder / name / "grpo", key)
            for key in ("reward/accuracy", "rollout/observations", "heldout/pass@1")
        },
        "control_steps": {"reward/accuracy": curve(folder / control / "grpo", "reward/accuracy")},
        "cpu_minutes": {kind: round(seconds / 60, 2) for kind, seconds in cpu.items()},
    }


def run() -> dict[str, Any]:
    """Every seed, one after the other."""
    root, bases = finished_chains(SEEDS)
    folder = root / "bench-tool"
    folder.mkdir(exist_ok=True)
    seeds = {name: measured(folder, name, base) for name, base in bases.items()}
    claims = []
    for name, of in seeds.items():
        before, after, without = (of[key] for key in ("cold_start", "rl", "control"))
        gain = after["sampled"]["pass@1"] - before["sampled"]["pass@1"]
        unit = {"unit": "of answers"}
        claims += [
            {"claim": f"{name}: RL's gain, sampled", "value": gain, "at_least": 0.4, **unit},
            {
                "claim": f"{name}: after RL, greedy",
                "value": after["greedy"]["pass@1"],
                "at_least": 0.8,
                **unit,
            },
            {
                "claim": f"{name}: without it, greedy",
                "value": without["greedy"]["pass@1"],
                "at_most": 0.05,
                **unit,
            },
        ]
    return {"claims": claims, "questions": QUESTIONS, "samples": SAMPLES, "seeds": seeds}
