"""`python -m pipeline leaderboard FOLDER`: all evaluations below a folder, a table for each benchmark.

`--json` writes them in the shape of lm-evaluation-harness's results (0.4.13, `lm_eval/result_schema.py`), an
object for each model. Filled: `results` (`alias`, `exact_match,none` = pass@1 with its `_stderr`, `pass@k` and
`cons@k` likewise without), `group_subtasks`, `configs`, `versions` (first digits of the problems' hash),
`n-shot`, `higher_is_better`, `n-samples`, `config`, `task_hashes`, `model_source`, `model_name`,
`model_name_sanitized`. A benchmark that a model has twice is `BENCHMARK@FOLDER` the second time.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from pipeline.evaluation.saved import ScoreFile, read_scores
from pipeline.evaluation.scores import percent
from pipeline.report.template import render
from pipeline.run.files import read_json, write_atomic
from pipeline.settings.evaluate import LeaderboardSettings


@dataclass(frozen=True, slots=True)
class Board:
    """What lies below a folder."""

    tables: dict[str, list[tuple[str, ScoreFile]]] = field(default_factory=lambda: defaultdict(list))
    """By benchmark: folder and scores, the best first."""
    unfinished: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """Why each cannot be read."""


def read_board(top: Path) -> Board:
    """All evaluations below `top`. Raises `UserError`: there is no such folder, or nothing in it."""
    if not top.is_dir():
        raise UserError(f"there is no folder {top}; name one with evaluations below it, such as runs")
    board = Board()
    files = (file for name in ("scores.json", "generations.jsonl") for file in top.rglob(name))
    for folder in sorted({file.parent for file in files}):
        label = str(folder.relative_to(top)) if folder != top else str(top)
        if not (folder / "scores.json").exists():
            board.unfinished.append(label)
            continue
        try:
            if "models" in read_json(folder / "scores.json"):  # the stage's own table of the same folders
                continue
            scores = read_scores(folder)
            board.tables[scores.inputs.benchmark].append((label, scores))
        except (UserError, OSError) as error:
            board.unreadable.append(str(error))
    if not (board.tables or board.unfinished or board.unreadable):
        raise UserError(f"no evaluation lies below {top}; make one with `evaluate`, or `make eval`")
    for rows in board.tables.values():
        rows.sort(key=lambda row: (-row[1].pass_1, row[0]))
    return board


def incomparable(rows: list[tuple[str, ScoreFile]]) -> Iterator[str]:
    """In what the rows of a benchmark differ beside the model, with the rows of each value."""
    made = {label: scores.made_as() for label, scores in rows}
    for key in next(iter(made.values())):
        values = defaultdict(list)
        for label, how in made.items():
            values[how.get(key)].append(label)
        if len(values) > 1:
            yield f"other {key}: " + "; ".join(f"{v} ({', '.join(of)})" for v, of in values.items())


def show_board(board: Board) -> None:
    """The tables for people."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for benchmark, rows in board.tables.items():
        table = Table("evaluation", title=benchmark)
        for column in (
            "score",
            "95 % interval",
            "pass@k",
            "cons@k",
            "n",
            "k",
            "cut",
            "failed",
            "tokens",
            "template",
        ):
            table.add_column(column, justify="right")
        for label, s in rows:
            low, high = s.interval
            more = (percent(s.pass_k), percent(s.cons_k)) if s.k > 1 else ("", "")
            shares = percent(s.pass_1), f"{100 * low:.1f} to {100 * high:.1f}", *more, str(s.n), str(s.k)
            tokens = "–" if s.mean_tokens is None else f"{s.mean_tokens:.1f}"
            ends = percent(s.truncation_rate), str(s.verifier_failures), tokens, s.template_hash[:8]
            table.add_row(label, *shares, *ends)
        console.print(table)
        for text in incomparable(rows):
            console.print(f"not comparable, {text}", soft_wrap=True, highlight=False, markup=False)
    for label in board.unfinished:
        console.print(f"unfinished: {label}", soft_wrap=True, highlight=False, markup=False)
    for text in board.unreadable:
        console.print(f"unreadable: {text}", soft_wrap=True, highlight=False, markup=False)


def harness_results(board: Board) -> dict[str, dict[str, Any]]:
    """Scores as lm-evaluation-harness writes them, by the model's path (see above)."""
    models: dict[str, dict[str, Any]] = {}
    for benchmark, rows in board.tables.items():
        for label, s in rows:
            of, digest = s.inputs, s.inputs.problems_sha256
            extra = of.model_extra or {}
            config = {"model": extra.get("engine"), "model_args": f"pretrained={of.model}", "limit": None}
            name = {"model_source": extra.get("engine"), "model_name": of.model}
            name["model_name_sanitized"] = re.sub(r"[\"<>:/|\\?*\[\]]+", "__", of.model)
            begun: dict[str, Any] = {"config": config, **name}
            out = models.setdefault(of.model, begun)
            task = f"{benchmark}@{label}" if benchmark in out.get("results", {}) else benchmark
            shots = extra.get("shots", 0)
            scores = {"alias": task, "exact_match,none": s.pass_1, "pass@k,none": s.pass_k}
            scores["exact_match_stderr,none"] = "N/A" if s.stderr is None else s.stderr
            scores |= {} if s.cons_k is None else {"cons@k,none": s.cons_k}
            how = {"task": task, "dataset_path": benchmark, "output_type": "generate_until", "repeats": s.k}
            entry = {
                **{"results": scores, "group_subtasks": [], "versions": digest[:8], "n-shot": shots},
                "configs": {**how, "num_fewshot": shots, "generation_kwargs": s.sampling},
                "higher_is_better": {"exact_match": True, "pass@k": True, "cons@k": True},
                "n-samples": {"original": s.n, "effective": s.n},
                "task_hashes": digest,
            }
            for key, value in entry.items():
                out.setdefault(key, {})[task] = value
    return models


def main(config: LeaderboardSettings) -> None:
    """The command; its last line on stdout is the number of evaluations as JSON."""
    board = read_board(config.folder)
    show_board(board)
    notes = {benchmark: list(incomparable(rows)) for benchmark, rows in board.tables.items()}
    if config.out:
        write_atomic(
            config.out, render("leaderboard.html.j2", folder=config.folder, board=board, notes=notes)
        )
    if config.json:
        write_atomic(config.json, json.dumps(harness_results(board), indent=2, ensure_ascii=False) + "\n")
    counts = {"evaluations": sum(map(len, board.tables.values())), "unfinished": len(board.unfinished)}
    print(json.dumps(counts | {"unreadable": len(board.unreadable)}))
