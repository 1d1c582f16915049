"""What the stages of a run left in their directories, and `summary.json`, the run's result for programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.jsonl import read_log
from pipeline.run.files import read_json, read_toml
from pipeline.run.metrics import GLOSSARY, GLOSSARY_FILE
from pipeline.table import STAGES, chain

KEYS = ("pass@1", "n", "interval", "format_rate", "language_consistency", "mean_tokens")
"""What summary.json holds of each model's scores on a benchmark."""


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage left in its directory."""

    name: str
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    glossary: dict[str, str]
    """What each of its metrics means."""
    seconds: float | None
    """`None` where it has not finished."""
    peak_rss_bytes: int
    seed: int | None
    ended: float = 0.0
    """When it finished, seconds since 1970."""


def read_stages(folder: Path) -> list[StageRecord]:
    """The stages of the chain that were begun, in its order, without the report."""
    found = []
    for stage in STAGES:
        path = folder / stage.name
        if stage.name not in chain() - {"report"} or not (path / "config.toml").is_file():
            continue
        done, env = read_json(path / "done.json"), read_json(path / "env.json")
        config = read_toml(path / "config.toml")
        cost = done.get("seconds"), done.get("peak_rss_bytes", 0), done.get("seed"), done.get("ended", 0.0)
        log, glossary = read_log(path / "metrics.jsonl"), GLOSSARY | read_json(path / GLOSSARY_FILE)
        found.append(StageRecord(stage.name, config, env, log, glossary, *cost))
    return found


def elapsed(records: list[StageRecord]) -> float:
    """Seconds in which a stage was at work; those of stages side by side count once."""
    total = until = 0.0
    for end, seconds in sorted(((r.ended, r.seconds or 0.0) for r in records), key=lambda r: r[0] - r[1]):
        total += max(0.0, min(seconds, end - until) if end else seconds)
        until = max(until, end)
    return total


def summarise(state: dict[str, Any], records: list[StageRecord], seed: int) -> dict[str, Any]:
    """The contract of summary.json: scores by model and benchmark, seconds, peak memory, seed. `state` is
    eval's scores.json, `seed` that of a run without a finished stage."""
    return {
        "models": {
            label: {name: {key: s[key] for key in KEYS} for name, s in by_benchmark.items()}
            for label, by_benchmark in state["scores"].items()
        },
        "seconds": round(elapsed(records), 2),
        "peak_rss_bytes": max((r.peak_rss_bytes for r in records), default=0),
        "seed": next((r.seed for r in records if r.seed is not None), seed),
        "not_made": state["not_made"],
        "not_scored": state["not_scored"],
        "stages": {r.name: {"seconds": r.seconds, "peak_rss_bytes": r.peak_rss_bytes} for r in records},
    }
