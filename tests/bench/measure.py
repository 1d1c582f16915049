"""How a benchmark measures: candidates interleaved, medians of rounds, one JSON under docs/results.

A shared machine slows everything down for a while, so what is compared runs in turn, round by round, and
only ratios of medians are claims. A round's ratio of two candidates that ran next to each other is steadier
still: `ratio` is the median of those.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run.environment import environment
from pipeline.run.files import write_atomic

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every round of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """How many times longer `other` takes: the median of the rounds' ratios."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def report(self) -> dict[str, float]:
        """For the JSON."""
        return {"median_s": self.median, "min_s": min(self.seconds), "max_s": max(self.seconds)}


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Time each candidate once a round, in turn, every second round in reverse order.

    Args:
        candidates: what to time, by name; a call does the whole work and returns when it is done.
        rounds: timed rounds.
        warmup: rounds before them that are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warmup, rounds):
        names = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
        for name in names:
            begin = time.perf_counter()
            candidates[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


@dataclass(frozen=True, slots=True)
class Candidate:
    """What `apart` times: `make(*args)`, called in a process of its own, gives the call that is timed."""

    make: Callable[..., Callable[[], object]]
    args: tuple[Any, ...]


def apart(candidates: Mapping[str, Candidate], rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """As `interleave`, each candidate in a process of its own, as somebody who uses it alone would have it.

    In one process they share a heap. What one leaves there decides whether another's large tensors come from
    memory at hand or from fresh pages, and that alone changed transformers' decoding twofold (docs/LOG.md).
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, candidate in candidates.items():
            pipes[name], end = context.Pipe()
            process = context.Process(target=_serve, args=(end, candidate), daemon=True)
            process.start()
            end.close()  # or a process that dies would leave us waiting
            processes.append(process)
            pipes[name].recv()  # made: one after the other

        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(-warmup, rounds):
            names = list(candidates) if number % 2 == 0 else list(candidates)[::-1]
            for name in names:
                pipes[name].send("go")
                took = float(pipes[name].recv())
                if number >= 0:
                    seconds[name].append(took)
        return {name: Timing(tuple(times)) for name, times in seconds.items()}
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()


def _serve(pipe: Connection, candidate: Candidate) -> None:
    call = candidate.make(*candidate.args)
    pipe.send("made")
    while True:
        try:
            pipe.recv()
        except EOFError:  # the parent has closed its end: no more rounds
            return
        begin = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - begin)


def record(name: str, result: Mapping[str, Any], prefix: str = "bench") -> Path:
    """Write `docs/results/PREFIX-NAME.json`: the result with machine, versions, commit and date."""
    env = environment()
    where = {key: env[key] for key in ("machine", "python", "packages", "commit", "modified")}
    path = RESULTS / f"{prefix}-{name}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    body = {"benchmark": name, "date": datetime.now(UTC).date().isoformat(), **where, **result}
    write_atomic(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return path


def peak_bytes() -> int:
    """Most memory that this process has had at once. (ru_maxrss would begin with that of its parent.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def finished_chains(count: int) -> tuple[Path, dict[str, Path]]:
    """The folder R1_RUNS, and of the first `count` finished chains (make r1) there the base models, by name.
    Raises `UserError`: there are fewer."""
    root = Path(os.environ.get("R1_RUNS", "runs"))
    models = sorted(root.glob("*/pretrain/model"))[:count]
    if len(models) < count:
        what = f"{root} holds {len(models)} finished chains, not {count}"
        raise UserError(f"{what}: set R1_RUNS, or make r1 them")
    return root, {model.parent.parent.name: model for model in models}
