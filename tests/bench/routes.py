"""Router replay and MTP modules in RL, on finished tiny chains: what each is worth.

Replay: the engine generates in bf16, the trainer computes in fp32, so that near-ties of the gates fall
differently. From the same base with the same seed, R1-Zero runs with and without replay; counted are the
experts that the trainer computes with and the engine did not, those that its own gates would choose
otherwise, and the mismatch KL between the two, a mean over the steps.

MTP: the share of guesses that are right at the beginning, after 20 and after 40 steps, with the modules
trained along and without.

The chains are the runs in the folder R1_RUNS (make r1). What is measured of each is kept in its bench-routes,
so that a benchmark that was killed goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from torch import Tensor

from model.kernels.layout import Layout
from model.moe import MoE
from pipeline.__main__ import main
from tests.bench.measure import finished_chains

SUMMARY = (
    "RL with a bf16 engine and an fp32 trainer with and without router replay; MTP modules trained along"
)
STEPS, SEEDS = 100, 3
MTP_STEPS, MTP_COEF = (0, 20, 40), 0.1
BF16 = ("--rollout.dtype", "bfloat16", "--rollout.routed-experts")
SPECULATE = ("--rollout.local.speculate",)


@contextmanager
def experts_counted() -> Iterator[dict[str, int]]:
    """Experts that training forwards use for tokens with a record, and those of them that are not in it."""
    counts, forward = {"used": 0, "other": 0}, MoE.forward

    def counted(
        self: MoE, x: Tensor, layout: Layout | None = None, recorded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, ids = forward(self, x, layout, recorded)
        if recorded is not None and torch.is_grad_enabled():
            engine = recorded.flatten(0, -2).tolist()
            for ours, theirs in zip(ids.tolist(), engine, strict=True):
                if theirs[0] >= 0:
                    counts["used"] += len(ours)
                    counts["other"] += len(set(ours) - set(theirs))
        return y, ids

    MoE.forward = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        MoE.forward = forward  # type: ignore[method-assign]


def zero(model: Path, folder: Path, name: str, steps: int, *flags: str) -> dict[str, Any]:
    """`steps` of R1-Zero from `model`: each one's metrics, experts counted, CPU seconds. Kept in `folder`."""
    kept = folder / f"{name}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    argv = ["zero", "--config", "configs/tiny/zero.toml", "--runs", str(folder), "--name", name]
    argv += [
        "--init-from",
        str(model),
        "--steps",
        str(steps),
        "--eval-every",
        "20",
        "--checkpoint-every",
        "500",
    ]
    began = process_time()
    with experts_counted() as counts:
        assert main([*argv, *flags]) == 0
    lines = (folder / name / "zero" / "metrics.jsonl").read_text().splitlines()
    made = {"cpu_s": process_time() - began, "experts": counts, "rows": [json.loads(line) for line in lines]}
    kept.write_text(json.dumps(made))
    return made


def mean_of(run: dict[str, Any], key: str) -> float:
    """A metric's mean over the steps."""
    return fmean(row[key] for row in run["rows"])


def replay(model: Path, folder: Path, name: str, steps: int) -> dict[str, Any]:
    """Without and with: experts that differ, mismatch KL, and held-out accuracy at the end."""
    found = {}
    for kind, flags in (("without", ()), ("with", ("--router-replay",))):
        run = zero(model, folder, f"{name}-{kind}-replay", steps, *BF16, *flags)
        found[kind] = {
            "experts_that_differ": run["experts"]["other"] / run["experts"]["used"],
            "own_choice_that_differs": mean_of(run, "policy/experts_differ"),
            "mismatch_kl": mean_of(run, "policy/mismatch_kl"),
            "mismatch_max": max(row["policy/mismatch_max"] for row in run["rows"]),
            "heldout": [row["heldout/pass@1"] for row in run["rows"] if "heldout/pass@1" in row],
            "cpu_s": run["cpu_s"],
        }
    return found | {"kl_ratio": found["without"]["mismatch_kl"] / found["with"]["mismatch_kl"]}


def drafts(model: Path, folder: Path, name: str, steps: tuple[int, ...]) -> dict[str, Any]:
    """Acceptance after each of `steps` updates, modules left alone and trained along."""
    found = {}
    for kind, coef in (("alone", 0.0), ("trained", MTP_COEF)):
        run = zero(model, folder, f"{name}-mtp-{kind}", max(steps) + 1, *SPECULATE, "--mtp-coef", str(coef))
        accepted = [run["rows"][step]["rollout/mtp_acceptance"] for step in steps]
        rewards = [run["rows"][step]["reward/mean"] for step in steps]
        found[kind] = {"acceptance": accepted, "reward": rewards, "cpu_s": run["cpu_s"]}
    return found


def run() -> dict[str, Any]:
    """Every seed, one after the other."""
    root, models = finished_chains(SEEDS)
    folder = root / "bench-routes"
    folder.mkdir(exist_ok=True)
    replays = {name: replay(model, folder, name, STEPS) for name, model in models.items()}
    guesses = {name: drafts(model, folder, name, MTP_STEPS) for name, model in models.items()}
    claims = []
    for name, of in replays.items():
        other = of["with"]["experts_that_differ"]
        claims.append({"claim": f"{name}: experts that differ, replayed", "value": other, "at_most": 0.0})
        claims.append(
            {"claim": f"{name}: KL without replay over with", "value": of["kl_ratio"], "at_least": 1.4}
        )
    for name, both in guesses.items():
        alone, trained = (both[kind]["acceptance"][-1] for kind in ("alone", "trained"))
        value = {"value": trained - alone, "at_least": 0.0, "unit": "of guesses"}
        claims.append(
            {"claim": f"{name}: acceptance after {MTP_STEPS[-1]} steps, trained less alone", **value}
        )
    about = {"steps": STEPS, "mtp_steps": MTP_STEPS, "mtp_coef": MTP_COEF}
    return {"claims": claims, **about, "replay": replays, "mtp": guesses}
