"""A queue of rounds four updates deep against on-policy RL, on finished tiny chains: does it learn as well?

From the same base with the same seed, R1-Zero runs for as many steps with both. The chains are the runs in
the folder R1_RUNS (make r1); this benchmark keeps its own in bench-queue and repeats none that is finished.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipeline.__main__ import main
from tests.bench.measure import finished_chains

SUMMARY = "RL with rollouts up to four updates old against on-policy RL, three seeds"
STEPS, SEEDS, DEPTH, LAST = 60, 3, 4, 10
KINDS = {
    "on-policy": (0, "old"),
    "queue": (DEPTH, "engine"),  # the loss's clip is around the weights that sampled
    "queue-old": (DEPTH, "old"),  # around those before the update: at one update a step it never clips
}
"""Staleness, and the anchor of the correction."""


def zero(model: Path, folder: Path, name: str, kind: str, seed: int) -> dict[str, Any]:
    """What a run's metrics say; accuracy is that of the rollouts, a mean over the last steps."""
    name, (staleness, anchor) = f"{name}-{kind}", KINDS[kind]
    stage = folder / name / "zero"
    if not (stage / "done.json").exists():
        argv = ["zero", "--config", "configs/tiny/zero.toml", "--runs", str(folder), "--name", name]
        argv += ["--init-from", str(model), "--seed", str(seed), "--steps", str(STEPS)]
        argv += ["--staleness", str(staleness), "--correction.anchor", anchor, "--max-mismatch-kl", "2"]
        assert main(argv) == 0
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    heldout = {row["step"]: row["heldout/pass@1"] for row in rows if "heldout/pass@1" in row}
    return {
        "accuracy": fmean(row["reward/accuracy"] for row in rows[-LAST:]),
        "heldout": heldout,
        "oldest": max(row.get("rollout/staleness_max", 0) for row in rows),
        "commit": json.loads((stage / "env.json").read_text())["commit"],
        "mismatch_kl_max": max(row["policy/mismatch_kl"] for row in rows),
    }


def run() -> dict[str, Any]:
    """Every seed, with and without the queue."""
    root, models = finished_chains(SEEDS)
    folder, found = root / "bench-queue", dict[str, dict[str, Any]]()
    for seed, (name, model) in enumerate(models.items(), start=1):
        found[name] = {kind: zero(model, folder, name, kind, seed) for kind in KINDS}
    plain = [of["on-policy"]["accuracy"] for of in found.values()]
    behind = fmean(plain) - fmean(of["queue"]["accuracy"] for of in found.values())
    oldest = max(of["queue"]["oldest"] for of in found.values())
    claims = [
        {"claim": "mean accuracy behind on-policy", "value": behind, "at_most": stdev(plain)},
        {"claim": "oldest weights, updates", "value": oldest, "at_most": DEPTH},
    ]
    return {"claims": claims, "steps": STEPS, "depth": DEPTH, "spread": stdev(plain), "seeds": found}
