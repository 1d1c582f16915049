"""Stages `eval` and `students`: every model of the chain, or every student, on every benchmark; one table.

    runs/NAME/eval/LABEL/BENCHMARK/   generations.jsonl, scores.json (pipeline.evaluation.evaluate)
    runs/NAME/eval/scores.json        all of them, with what could not be scored and why

It may be run again after more models were made: pairs whose model and settings are unchanged are kept,
changed ones are scored again. Nothing is left out silently: a benchmark that cannot be read is listed
with the reason, a model that is not there yet with the command that makes it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipeline.data.hub import is_model_name
from pipeline.data.problems import problems
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.scores import percent
from pipeline.run.directory import RunDir
from pipeline.run.files import read_json, write_atomic
from pipeline.run.metrics import say
from pipeline.settings.common import shared
from pipeline.settings.evaluate import EvalSettings, EvaluateSettings
from pipeline.table import STAGES
from pipeline.train.place import device_named


def run(config: EvalSettings, run_dir: RunDir) -> None:
    """The stage."""
    device_named(config.device)  # refuse it before the first model is opened
    if config.threads:
        torch.set_num_threads(config.threads)
    made, missing = find_models(config, run_dir)
    for model in made.values():
        if tokens := tokens_of(Path(model["path"])):
            model["tokens"] = tokens
    sources, unread = find_benchmarks(config)
    config = replace(config, corpus=tuple(str(run_dir.corpus_input(value)) for value in config.corpus))
    scored: dict[str, dict[str, Any]] = {label: {} for label in made}
    state = {"models": made, "not_made": missing, "not_scored": unread, "scores": scored}
    for label, model in made.items():
        for benchmark, pair in sources.items():
            out = run_dir.path / label / benchmark
            scored[label][benchmark] = score_pair(config, out, model, *pair, run_dir.stop_if_interrupted)
            write_atomic(run_dir.path / "scores.json", json.dumps(state, indent=2, ensure_ascii=False) + "\n")
            run_dir.stop_if_interrupted()
    for stale in (p for p in run_dir.path.iterdir() if p.is_dir() and p.name not in made):
        say(f"eval: {stale} is of a model that is not in the table now; it is left as it is")
    print_table(state)


def find_models(config: EvalSettings, run_dir: RunDir) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Models by label: those there are, with path and hash, and those not made yet, with how to make them.
    Raises `UserError`: there is none at all."""
    made: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for entry in config.models:
        label, _, value = entry.partition("=")
        stage = value.split("/")[0]
        of_run = stage in {s.name for s in STAGES}
        path = run_dir.path.parent / value / "model" if of_run else Path(value)
        if not of_run and is_model_name(value):
            try:
                path = run_dir.model_input(value)
                made[label] = {"from": value, "path": str(path), "sha256": path.name}
            except UserError as error:
                missing[label] = str(error)
        elif (path / "config.json").is_file():
            made[label] = {"from": value, "path": str(path), "sha256": run_dir.record_input(path)}
        elif of_run:
            missing[label] = f"not made yet: make {stage} ARGS='--name {config.name}'"
        else:
            missing[label] = f"there is no model at {path}"
    if not made:
        raise UserError(f"run {config.name} has no model to score ({next(iter(missing.values()))})")
    return made, missing


def tokens_of(model: Path) -> dict[str, int]:
    """Tokens that a model's stage `trained` on and `sampled`, where it has recorded them."""
    found = read_json(model / "pipeline.json").get("tokens")
    return {key: n for key, n in found.items() if isinstance(n, int)} if isinstance(found, dict) else {}


def find_benchmarks(config: EvalSettings) -> tuple[dict[str, tuple[str, int | None]], dict[str, str]]:
    """Source and limit of each benchmark that can be read, and the reason for each extra one that cannot.
    Raises `UserError`: one of the required ones cannot be read, or two have one label."""
    found: dict[str, tuple[str, int | None]] = {}
    unread: dict[str, str] = {}
    for entry in config.benchmarks + config.extra_benchmarks:
        label, equals, source = entry.partition("=")
        if not equals:
            label, source = Path(entry).stem.replace(":", "-"), entry
        if label in found.keys() | unread.keys():
            raise UserError(f"two benchmarks are called {label!r}; name one of them LABEL={source}")
        extra = entry not in config.benchmarks
        generated = source == "heldout" or source.startswith("generator:")
        limit = config.heldout_count if generated else (config.extra_limit or None) if extra else None
        try:
            seed, data = config.heldout_seed, config.data
            problems(source, count=limit, seed=seed, data_dir=data, rows=config)
            found[label] = source, limit
        except UserError as error:
            if not extra:
                raise
            unread[label] = str(error).removeprefix(f"{source}: ")
    return found, unread


def score_pair(
    config: EvalSettings,
    out: Path,
    model: dict[str, Any],
    source: str,
    limit: int | None,
    pause: Callable[[], None],
) -> dict[str, Any]:
    """Scores in `out` of one model on one benchmark; earlier ones where nothing changed."""
    own = {"model": Path(model["path"]), "benchmark": source, "out": out, "limit": limit}
    own |= {"problems_seed": config.heldout_seed}
    pair = EvaluateSettings(**shared(config, EvaluateSettings) | own)
    file = out / "scores.json"
    before = file.stat().st_mtime_ns if file.exists() else None
    result = evaluate(pair, model["sha256"], replace_changed=True, pause=pause)
    low, high = result["interval"]
    note = "  (kept: nothing changed)" if before == file.stat().st_mtime_ns else ""
    label = f"{out.parent.name:14} {out.name:10}"
    say(f"eval     {label} {result['pass@1']:6.1%}  [{low:.1%}, {high:.1%}]{note}")
    return result


def print_table(state: dict[str, Any]) -> None:
    """The table of all models by benchmark, on the console."""
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width; 80 would break the rows
    table = Table(title="accuracy (pass@1) with its 95 % interval over the questions")
    spent = {label: model.get("tokens", {}) for label, model in state["models"].items()}
    counts = ("trained", "sampled") if any(spent.values()) else ()
    table.caption = "tokens trained on, sampled: of the model's own stage alone" if counts else None
    numbers = ("accuracy", "95 % interval", "n", "format", "language", "tokens", "cut", "failed", *counts)
    for column in ("model", "benchmark", *numbers):
        table.add_column(column, justify="right" if column in numbers else "left")
    for label, by_benchmark in state["scores"].items():
        for benchmark, s in by_benchmark.items():
            low, high = s["interval"]
            accuracy, interval = percent(s["pass@1"]), f"{100 * low:.1f} to {100 * high:.1f}"
            tokens = "–" if s["mean_tokens"] is None else f"{s['mean_tokens']:.1f}"
            shares = percent(s["format_rate"]), percent(s["language_consistency"])
            ends = percent(s["truncation_rate"]), str(s["verifier_failures"])
            took = (f"{spent[label][key]:,}" if key in spent[label] else "–" for key in counts)
            table.add_row(label, benchmark, accuracy, interval, str(s["n"]), *shares, tokens, *ends, *took)
    console.print(table)
    for label, why in state["not_made"].items():
        say(f"{label}: {why}")
    for benchmark, why in state["not_scored"].items():
        say(f"{benchmark}: not scored: {why}")
