"""Stage `eval`: every model of the chain on every benchmark, and one table.

    runs/NAME/eval/LABEL/BENCHMARK/   generations.jsonl and scores.json of a pair (pipeline.tools.evaluate)
    runs/NAME/eval/scores.json        all of them, with what could not be scored and why

It may be run again after more models were made: pairs whose model and settings are unchanged are kept,
changed ones are scored anew. Nothing is left out silently: a benchmark that cannot be read is listed
with the reason, a model that is not there yet with the command that makes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipeline.data.problems import problems
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.files import write_atomic
from pipeline.run.metrics import say
from pipeline.settings.evaluate import EvalSettings, EvaluateSettings
from pipeline.table import STAGES
from pipeline.tools.evaluate import evaluate
from pipeline.tools.scores import percent


@dataclass(frozen=True, slots=True)
class Source:
    """A benchmark of the table."""

    label: str
    source: str
    limit: int | None


def run(config: EvalSettings, run_dir: RunDir) -> None:
    """The stage."""
    if config.threads:
        torch.set_num_threads(config.threads)
    made, missing = find_models(config, run_dir)
    sources, unread = find_benchmarks(config)
    scored: dict[str, dict[str, Any]] = {label: {} for label in made}
    state = {"models": made, "not_made": missing, "not_scored": unread, "scores": scored}
    for label, model in made.items():
        for source in sources:
            scored[label][source.label] = score_pair(config, run_dir, label, model, source)
            write_atomic(run_dir.path / "scores.json", json.dumps(state, indent=2, ensure_ascii=False) + "\n")
            run_dir.stop_if_interrupted()
    for stale in (p for p in run_dir.path.iterdir() if p.is_dir() and p.name not in made):
        say(f"eval: {stale} is of a model that is not in the table now; it is left as it is")
    print_table(state)


def find_models(config: EvalSettings, run_dir: RunDir) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Models by label: those there are, with path and hash, and those not made yet, with how to make them.

    Raises:
        UserError: there is none at all.
    """
    made: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    for entry in config.models:
        label, _, value = entry.partition("=")
        stage = value.split("/")[0]
        of_run = stage in {s.name for s in STAGES}
        path = run_dir.path.parent / value / "model" if of_run else Path(value)
        if (path / "config.json").is_file():
            run_dir.record_input(path)
            inputs = json.loads((run_dir.path / "env.json").read_text())["inputs"]
            made[label] = {"from": value, "path": str(path), "sha256": inputs[str(path)]}
        else:
            how = f"make {stage} ARGS='--name {config.name}'" if of_run else f"there is no model at {path}"
            missing[label] = f"not made yet: {how}" if of_run else how
    if not made:
        first = next(iter(missing.values()))
        raise UserError(f"run {config.name} has no model to score ({first})")
    return made, missing


def find_benchmarks(config: EvalSettings) -> tuple[list[Source], dict[str, str]]:
    """The benchmarks that can be read, and the extra ones that cannot, each with the reason.

    Raises:
        UserError: one of the required ones cannot be read, or two have one label.
    """
    found: list[Source] = []
    unread: dict[str, str] = {}
    for entry in config.benchmarks + config.extra_benchmarks:
        label, equals, source = entry.partition("=")
        if not equals:
            label, source = Path(entry).stem.replace(":", "-"), entry
        if label in {s.label for s in found} | unread.keys():
            raise UserError(f"two benchmarks are called {label!r}; name one of them LABEL={source}")
        extra = entry not in config.benchmarks
        generated = source == "heldout" or source.startswith("generator:")
        limit = config.heldout_count if generated else (config.extra_limit or None) if extra else None
        try:
            problems(source, count=limit, seed=config.heldout_seed, data_dir=config.data)
        except UserError as error:
            if not extra:
                raise
            unread[label] = str(error).removeprefix(f"{source}: ")
            continue
        found.append(Source(label, source, limit))
    return found, unread


def score_pair(
    config: EvalSettings, run_dir: RunDir, label: str, model: dict[str, str], source: Source
) -> dict[str, Any]:
    """Scores of one model on one benchmark; earlier ones where nothing changed."""
    out = run_dir.path / label / source.label
    pair = EvaluateSettings(
        model=Path(model["path"]),
        benchmark=source.source,
        out=out,
        engine=config.engine,
        samples=config.samples,
        data=config.data,
        limit=source.limit,
        template=config.template,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        seed=config.seed,
        problems_seed=config.heldout_seed,
        max_batch=config.max_batch,
        dtype=config.dtype,
    )
    before = (out / "scores.json").stat().st_mtime_ns if (out / "scores.json").exists() else None
    result = evaluate(pair, model["sha256"], replace_changed=True)
    kept = before == (out / "scores.json").stat().st_mtime_ns
    low, high = result["interval"]
    note = "  (kept: nothing changed)" if kept else ""
    say(f"eval     {label:14} {source.label:10} {result['pass@1']:6.1%}  [{low:.1%}, {high:.1%}]{note}")
    return result


def print_table(state: dict[str, Any]) -> None:
    """The table of all models by benchmark, on the console."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width; 80 would break the rows
    table = Table(title="accuracy (pass@1) with its 95 % interval over the questions")
    for column in ("model", "benchmark"):
        table.add_column(column)
    for column in ("accuracy", "95 % interval", "n", "format", "language", "tokens", "cut", "failed"):
        table.add_column(column, justify="right")
    for label, by_benchmark in state["scores"].items():
        for benchmark, s in by_benchmark.items():
            low, high = s["interval"]
            tokens = "–" if s["mean_tokens"] is None else f"{s['mean_tokens']:.1f}"
            table.add_row(
                label,
                benchmark,
                percent(s["pass@1"]),
                f"{100 * low:.1f} to {100 * high:.1f}",
                str(s["n"]),
                percent(s["format_rate"]),
                percent(s["language_consistency"]),
                tokens,
                percent(s["truncation_rate"]),
                str(s["verifier_failures"]),
            )
    console.print(table)
    for label, why in state["not_made"].items():
        say(f"{label}: {why}")
    for benchmark, why in state["not_scored"].items():
        say(f"{benchmark}: not scored: {why}")
