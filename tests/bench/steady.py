"""500 steps of RL at a learning rate of 0: whatever moves is a fault.

The micro preset is pretrained, then R1-Zero runs on it in one process with `optim.lr` and
`optim.router_bias_gamma` 0, twice: plain, and with router replay and a queue of four rounds. A KL penalty
keeps all rollouts in the update. The weights stay the same bit by bit, so that:

    mismatch    the KL between engine and trainer is fp32's rounding, no larger at the end
    memory      as much is in use in steps 450 to 500 as in steps 200 to 250. The process itself is larger by
                what it has freed: `pipeline.train.heap` keeps that, with holes, whose number levels off
    samples     equal completions within a group, and between two visits of a problem, are as many as
                independent samples give: two are equal with probability sum_x p(x)^2 = E p(x), whose estimate
                is the mean of exp(sum of log-probabilities) over the rollouts
    problems    none comes twice within an epoch
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any, NamedTuple

import numpy as np

from pipeline.__main__ import main
from pipeline.arguments import load
from pipeline.run.directory import RunDir, open_run
from pipeline.settings.rollouts import GrpoSettings
from pipeline.stages.grpo import Trainer, train_rounds
from pipeline.table import STAGES
from rollout.collect import Round
from rollout.types import Rollout
from rollout.weights import fingerprint

SUMMARY = "500 steps of RL at a rate of 0: mismatch, memory, weights, and that samples are independent"
STEPS, EARLY, LATE = 500, (200, 250), (450, 500)
KINDS: dict[str, tuple[str, ...]] = {"plain": (), "queue": ("--router-replay", "--staleness", "4")}
PAGE = os.sysconf("SC_PAGE_SIZE")


class Sample(NamedTuple):
    """What is kept of a rollout: little, or it would show in the memory."""

    problem: str
    tokens: bytes
    chance: float

    @classmethod
    def of(cls, rollout: Rollout) -> Sample:
        """`chance`: of exactly these tokens."""
        tokens = np.asarray(rollout.token_ids, np.int32).tobytes()
        return cls(rollout.prompt.problem.id, tokens, math.exp(math.fsum(rollout.logprobs)))


class Watched(Trainer):
    """Notes, of each step, the memory of the process and what is in use of it, the mismatch, the samples."""

    def __init__(self, config: GrpoSettings, run_dir: RunDir) -> None:
        super().__init__(config, run_dir)
        self.bytes, self.used = list[int](), list[int]()
        self.kls, self.made = list[float](), list[list[Sample]]()
        self.began = self.weights()

    def weights(self) -> int:
        """Fingerprint of all tensors, multi-token-prediction modules included."""
        return fingerprint(self.policy.state_dict().values())

    def round(self, step: int) -> tuple[Round, dict[str, float]]:
        done, metrics = super().round(step)
        self.made.append([Sample.of(g.rollout) for g in done.graded])
        return done, metrics

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        metrics, records = super().step(step)
        self.kls.append(metrics["policy/mismatch_kl"])
        self.bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
        self.used.append(in_use(self.run_dir.path / "malloc.xml"))
        return metrics, records


def in_use(file: Path) -> int:
    """Bytes that all arenas of glibc's malloc have given out and not got back, by way of `file`."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.fopen(bytes(file), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    totals = file.read_text().rpartition("</heap>")[2]
    sizes = {kind: int(size) for kind, size in re.findall(r'type="(\w+)".* size="(\d+)"', totals)}
    return sizes["current"] + sizes["mmap"] - sizes["fast"] - sizes["rest"]


def span(values: list[float] | list[int], steps: tuple[int, int]) -> float:
    """Mean over these steps, counted from 1, both included."""
    return fmean(values[steps[0] - 1 : steps[1]])


def equals(sets: Iterable[list[Sample]]) -> dict[str, float]:
    """Pairs of equal completions within each set, and the number that independent samples are expected to
    give: a pair of a set is equal with the mean of their probabilities."""
    pairs = found = 0
    expected = 0.0
    for made in sets:
        for a, b in itertools.combinations(made, 2):
            pairs, found = pairs + 1, found + (a.tokens == b.tokens)
            expected += (a.chance + b.chance) / 2
    return {"pairs": pairs, "equal": found, "expected": expected}


def excess(of: dict[str, float]) -> float:
    """By how many standard deviations there are more equal pairs than expected; of a count so small that one
    is no surprise, by at most that one."""
    return (of["equal"] - of["expected"]) / math.sqrt(of["expected"] + 1)


def repeats(ids: list[str], epoch: int) -> int:
    """Problems that come again before their epoch, of `epoch` problems, is over."""
    parts = [ids[at : at + epoch] for at in range(0, len(ids), epoch)]
    return sum(len(part) - len(set(part)) for part in parts)


def measure(folder: Path, kind: str, steps: int = STEPS) -> dict[str, Any]:
    """One run from the micro base in `folder`."""
    argv = ["--runs", str(folder), "--name", kind, "--init-from", str(folder / "base/pretrain/model")]
    argv += ["--optim.lr", "0", "--optim.router-bias-gamma", "0", "--kl-coef", "0.001", "--threads", "1"]
    argv += ["--steps", str(steps), "--checkpoint-every", str(steps), "--eval-every", "0"]
    argv += ["--max-idle-steps", "0", "--log-samples", "0", *KINDS[kind]]
    stage = next(stage for stage in STAGES if stage.name == "zero")
    config = load(stage, Path("configs/micro/zero.toml"), argv)
    kept: list[Watched] = []

    def make() -> Watched:
        kept.append(Watched(config, run_dir))
        return kept[0]

    began = process_time()
    with open_run(stage, config, "make bench ARGS=steady") as run_dir:
        train_rounds(config, run_dir, make)
    (trainer,) = kept
    size = config.group_size
    groups = [made[at : at + size] for made in trainer.made for at in range(0, len(made), size)]
    visits = defaultdict[str, list[Sample]](list)  # the first rollout of each visit of a problem
    for group in groups:
        visits[group[0].problem].append(group[0])
    kls = trainer.kls
    return {
        "steps": len(kls),
        "mismatch_kl": {"early": span(kls, EARLY), "late": span(kls, LATE), "most": max(kls)},
        "memory_bytes": {"early": span(trainer.bytes, EARLY), "late": span(trainer.bytes, LATE)},
        "memory_of_every_50th_step": trainer.bytes[::50],
        "in_use_bytes": {"early": span(trainer.used, EARLY), "late": span(trainer.used, LATE)},
        "weights_moved": trainer.weights() != trainer.began,
        "in_groups": equals(groups),
        "between_visits": equals(visits.values()),
        "problems": len(trainer.problems),
        "repeated_problems": repeats([group[0].problem for group in groups], len(trainer.problems)),
        "cpu_s": process_time() - began,
    }


def claims(kind: str, of: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold of a run."""
    kl, memory, used = of["mismatch_kl"], of["memory_bytes"], of["in_use_bytes"]
    at_most = {
        "mismatch KL of any step": (kl["most"], 1e-9, "nats"),
        "mismatch KL, steps 450 to 500 over 200 to 250": (kl["late"] / kl["early"], 1.25, "x"),
        "memory in use, steps 450 to 500 apart from 200 to 250": (
            100 * abs(used["late"] / used["early"] - 1), 2.0, "%",
        ),
        "memory of the process, likewise": (100 * abs(memory["late"] / memory["early"] - 1), 5.0, "%"),
        "weights that moved": (float(of["weights_moved"]), 0.0, "(0 = none)"),
        "equal completions in groups above the expected": (excess(of["in_groups"]), 3.0, "deviations"),
        "equal completions of a problem's visits, too": (excess(of["between_visits"]), 3.0, "deviations"),
        "problems that come twice in an epoch": (float(of["repeated_problems"]), 0.0, "problems"),
    }  # fmt: skip
    return [
        {"claim": f"{kind}: {what}", "value": value, "at_most": bound, "unit": unit}
        for what, (value, bound, unit) in at_most.items()
    ]


def run() -> dict[str, Any]:
    """Both runs, one after the other in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = ["--config", "configs/micro/pretrain.toml", "--runs", name, "--name", "base", "--threads", "1"]
        assert main(["pretrain", *base]) == 0
        made = {kind: measure(folder, kind) for kind in KINDS}
    return {"claims": [claim for kind, of in made.items() for claim in claims(kind, of)], "runs": made}
