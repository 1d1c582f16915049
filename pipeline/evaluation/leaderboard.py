"""`python -m pipeline leaderboard FOLDER`: all evaluations below a folder, a table for each benchmark.

`--json` has the shape of lm-evaluation-harness's results (0.4.13, `lm_eval/result_schema.py`), an object for
each model. Filled: `results` (`alias`; `exact_match,none`, which is pass@1, with its `_stderr`;
`pass@k,none`, `cons@k,none`), `versions` (of the problems' hash), `n-shot`, `n-samples`, `configs`,
`higher_is_better`, `config`, `model_name`. What a model has twice is `BENCHMARK@FOLDER` the second time.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.data.jsonl import JsonObject
from pipeline.errors import UserError
from pipeline.evaluation.saved import read_scores
from pipeline.evaluation.scores import percent
from pipeline.report.template import render
from pipeline.run.files import read_json, write_atomic
from pipeline.settings.evaluate import LeaderboardSettings

Scored = list[tuple[str, JsonObject]]
"""Folder and scores of each evaluation."""


def read_all(top: Path) -> tuple[dict[str, Scored], list[str]]:
    """The evaluations below `top` by benchmark, the best first, and a line for each that cannot be scored.
    Raises `UserError`: there is none at all."""
    found, left_out = defaultdict[str, Scored](list), list[str]()
    files = (file for name in ("scores.json", "generations.jsonl") for file in top.rglob(name))
    for folder in sorted({file.parent for file in files}):
        try:
            if "models" in read_json(folder / "scores.json"):
                continue  # the stage `eval`'s own table, of folders that are below it
            scores = read_scores(folder)
            found[scores["inputs"]["benchmark"]].append((str(folder.relative_to(top)), scores))
        except (UserError, OSError) as error:
            left_out.append(str(error))
    if not found and not left_out:
        raise UserError(f"no evaluation lies below {top}; make one with `evaluate`, or name another folder")
    for rows in found.values():
        rows.sort(key=lambda row: (-row[1]["pass@1"], row[0]))
    return found, left_out


def incomparable(rows: Scored) -> Iterator[str]:
    """In what the evaluations of a benchmark differ beside the model, with those of each value."""
    sampling = ("k", "top_k", "temperature", "top_p", "max_tokens", "environment", "max_turns")
    for key in ("problems", "template", "grading", *sampling):
        values = defaultdict[object, list[str]](list)
        for label, s in rows:
            of, graded = s["inputs"], "strict" if "strict" in str(s.get("graded_again")) else "lenient"
            own = {"problems": of["problems_sha256"][:8], "template": s["template_hash"][:8], "k": s["k"]}
            own |= {"grading": graded, "top_k": str(of.get("top_k", 0))}
            own |= {key: str(of.get(key, "none")) for key in ("environment", "max_turns")}
            values[(own | s["sampling"]).get(key)].append(label)
        if len(values) > 1:
            of = "; ".join(f"{value} in {', '.join(labels)}" for value, labels in values.items())
            yield f"not comparable, other {key}: {of}"


def print_scores(benchmark: str, rows: Scored) -> Console:
    """The table of a benchmark, with what is not comparable in it; the console, for more."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a log has no width
    several = any(s["k"] > 1 for _, s in rows)
    table = Table("evaluation", title=benchmark)
    counts = ("n", "k", *(("pass@k", "cons@k") if several else ()))
    for column in ("accuracy", "95 % interval", *counts, "cut", "failed", "tokens", "template"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, s in rows:
        low, high = s["interval"]
        tokens = "–" if s["mean_tokens"] is None else f"{s['mean_tokens']:.1f}"
        own = percent(s["pass@1"]), f"{100 * low:.1f} to {100 * high:.1f}"
        more = [percent(s[key]) if "@" in key else str(s[key]) for key in counts]
        ends = percent(s["truncation_rate"]), str(s["verifier_failures"]), tokens, s["template_hash"][:8]
        table.add_row(label, *own, *more, *ends)
    console.print(table)
    for note in incomparable(rows):
        console.print(note)
    return console


def harness_results(found: dict[str, Scored]) -> dict[str, dict[str, Any]]:
    """Scores as lm-evaluation-harness writes them (see above), by the model's path."""
    models: dict[str, dict[str, Any]] = {}
    for benchmark, label, s in ((name, *row) for name, rows in found.items() for row in rows):
        inputs = s["inputs"]
        config = {"model": inputs.get("engine"), "model_args": f"pretrained={inputs['model']}"}
        about = {"config": config | {"gen_kwargs": s["sampling"]}, "model_name": inputs["model"]}
        model = models.setdefault(inputs["model"], about)
        task = f"{benchmark}@{label}" if benchmark in model.get("results", {}) else benchmark
        scores = {f"{key},none": s[key] for key in ("pass@k", "cons@k") if s[key] is not None}
        error = "N/A" if s.get("stderr") is None else s["stderr"]
        exact = {"exact_match,none": s["pass@1"], "exact_match_stderr,none": error}
        for key, value in {
            **{"results": {"alias": task, **exact, **scores}, "versions": inputs["problems_sha256"][:8]},
            **{"n-shot": inputs.get("shots", 0), "n-samples": {"original": s["n"], "effective": s["n"]}},
            "configs": {"task": task, "dataset_path": benchmark, "repeats": s["k"]},
            "higher_is_better": dict.fromkeys(("exact_match", "pass@k", "cons@k"), True),
        }.items():
            model.setdefault(key, {})[task] = value
    return models


def main(config: LeaderboardSettings) -> None:
    """The command; its last line on stdout is the number of evaluations, and of those left out, as JSON."""
    found, left_out = read_all(config.folder)
    for benchmark, rows in found.items():
        print_scores(benchmark, rows)
    print("".join(f"left out: {line}\n" for line in left_out), end="")
    if config.out:
        tables = [(benchmark, rows, list(incomparable(rows))) for benchmark, rows in found.items()]
        lead = "Where the intervals of two overlap, the command compare tests the pair."
        given = {"title": f"Evaluations below {config.folder}", "lead": lead, "left_out": left_out}
        write_atomic(config.out, render("scores.html.j2", tables=tables, changed=None, **given))
    if config.json:
        write_atomic(config.json, json.dumps(harness_results(found), indent=2, ensure_ascii=False) + "\n")
    print(json.dumps({"evaluations": sum(map(len, found.values())), "left_out": len(left_out)}))
