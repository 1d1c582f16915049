"""The report page of a run."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.jsonl import read_log
from pipeline.report.plots import Box, Series, chain_plot, line_plot
from pipeline.report.summary import StageRecord
from pipeline.report.template import render, split_thought
from pipeline.run.metrics import GLOSSARY
from pipeline.table import STAGES

TITLES = {
    "pretrain": "base", "zero": "R1-Zero", "sft": "Dev1", "grpo": "Dev2", "reject": "corpus", "sft2": "Dev3",
    "grpo2": "R1", "distill": "students", "student": "small base",
}  # fmt: skip
"""What each stage makes, in the paper's words (arXiv:2501.12948, Fig. 2)."""

COLORS = {stage: f"s{i}" for i, stage in enumerate(TITLES)}

RL_PLOTS = (
    # metric, unit, what the value axis shows at least
    ("heldout/pass@1", "share", 0.0, 1.0),
    ("reward/accuracy", "share", 0.0, 1.0),
    ("reward/mean", "reward", 0.0, None),
    ("rollout/tokens_mean", "tokens", 0.0, None),
    ("reward/format", "share", 0.0, 1.0),
    ("reward/language", "share", None, 1.0),
    ("policy/entropy", "nats", 0.0, None),
    ("policy/mismatch_kl", "nats a token", 0.0, None),
)
LOSS_PLOTS = {"pretrain": ("pretrain", "student"), "fine-tuning": ("sft", "sft2", "distill")}

SCORE_GLOSSARY = {
    "pass@1": "accuracy: mean over questions of the share of right samples (greedy: share of right answers)",
    "95 % interval": "over questions: Wilson's, of several samples with the effective number of questions",
    "format": "share of completions in R1's form: one think block, then one answer block, nothing else",
    "language": "mean share of words in the question's language",
    "tokens": "mean completion length, tokens",
    "cut": "share of completions that ended at the token limit",
    "failed": "completions whose verifier failed; they count as not right",
    "pass@k": "chance that one of k samples is right, unbiased (arXiv:2107.03374, Eq. 1)",
    "cons@k": "accuracy of the most frequent answer of k samples, mathematics only",
}


def build_page(
    name: str,
    state: dict[str, Any],
    records: list[StageRecord],
    summary: dict[str, Any],
    transcripts: list[dict[str, Any]],
) -> str:
    """The page: `state` is eval's scores.json, `transcripts` are `read_transcripts`'."""
    main = main_benchmark(state)
    scores = {label: by_benchmark.get(main) for label, by_benchmark in state["scores"].items()}
    boxes, edges = chain_of(state["models"], scores, records)
    known = {key: line for r in records for key, line in r.glossary.items()}
    used = sorted({key for r in records for row in r.metrics for key in row} & known.keys())
    own = [(key, "", None, None) for key in used if key not in GLOSSARY]  # of a user's rewards
    rl = [r for r in records if any("reward/mean" in row for row in r.metrics)]  # reject trains no policy
    kinds = (*RL_PLOTS, *own)
    plots = [(key, line_plot(key, unit, curves(rl, key), low, high)) for key, unit, low, high in kinds]
    chain = {f"chain_{name}": chain_plot(boxes, edges, name == "tall") for name in ("wide", "tall")}
    given = {"name": name, "state": state, "records": records, "summary": summary, "transcripts": transcripts}
    looks = {"titles": TITLES, "colors": COLORS}
    return render(
        "page.html.j2",
        **{**given, **looks, **chain, "main": main, "scores": scores, "rl_stages": rl},
        tables=[table(state, name) for name in benchmarks(state)],
        rl=[{"key": key, "what": known[key], "svg": svg} for key, svg in plots if svg],
        losses=list(loss_plots(records)),
        origin=origin(records),
        glossary={**SCORE_GLOSSARY, **{key: known[key] for key in used}},
    )


def benchmarks(state: dict[str, Any]) -> list[str]:
    """Every benchmark on which a model was scored."""
    return list(dict.fromkeys(name for by_benchmark in state["scores"].values() for name in by_benchmark))


def main_benchmark(state: dict[str, Any]) -> str:
    """The benchmark of the headline: `heldout`, or else the first there is."""
    names = benchmarks(state)
    return "heldout" if "heldout" in names or not names else names[0]


def chain_of(
    models: dict[str, Any], scores: dict[str, Any], records: list[StageRecord]
) -> tuple[list[Box], list[tuple[str, str]]]:
    """Boxes and edges of the chain's plot: every stage, made or not."""
    begun = {r.name: r for r in records}
    boxes = []
    for stage, title in TITLES.items():
        labels = [label for label, model in models.items() if model["from"].split("/")[0] == stage]
        values = tuple((label, s["pass@1"] if (s := scores.get(label)) else None) for label in labels)
        rows = begun[stage].metrics if stage in begun else []
        note = "" if stage in begun else "not made yet"
        if kept := [row["data/kept"] for row in rows if "data/kept" in row]:
            note = f"kept {100 * sum(kept) / len(kept):.0f} %"
        boxes.append(Box(stage, title, values, note))
    edges = [(a, s.name) for s in STAGES if s.name in TITLES for a in s.after if a in TITLES]
    return boxes, edges


def table(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The table of a benchmark, its rows in the order of the chain."""
    rows = [(label, s[name]) for label, s in state["scores"].items() if name in s]
    return {"name": name, "rows": rows, "sampled": any(s["k"] > 1 for _, s in rows)}


def curves(records: Iterable[StageRecord], key: str) -> list[Series]:
    """A series of `key` for each stage that logged it, over its steps."""
    found = []
    for record in records:
        points = tuple((float(row["step"]), float(row[key])) for row in record.metrics if key in row)
        if points:
            found.append(Series(record.name, COLORS.get(record.name, "ink"), points))
    return found


def loss_plots(records: Iterable[StageRecord]) -> Iterator[dict[str, Any]]:
    """The plots of supervised training, each with its stages."""
    for name, stages in LOSS_PLOTS.items():
        some = [r for r in records if r.name in stages]
        if svg := line_plot(f"{name}: loss", "nats a token", curves(some, "loss/lm"), 0.0):
            yield {"key": f"{name}: loss", "what": GLOSSARY["loss/lm"], "stages": some, "svg": svg}


def read_transcripts(files: dict[str, Path], count: int) -> list[dict[str, Any]]:
    """At most `count` problems as several models answered them: first samples, not chosen by outcome. `files`
    are generations.jsonl by the model's label, all of one benchmark; the problems are evenly spaced."""
    logs = {label: read_log(file) for label, file in files.items() if file.is_file()}
    rows = {label: {r["index"]: r for r in log if r["sample"] == 0} for label, log in logs.items()}
    common = sorted(set.intersection(*map(set, rows.values()))) if rows else []
    count = min(count, len(common))
    shown = []
    for index in (common[i * len(common) // count] for i in range(count)):
        answers = []
        for label, row in ((label, by_index[index]) for label, by_index in rows.items()):
            answers.append({"label": label, **split_thought(row["text"]), **row})
        shown.append({"question": answers[0]["question"], "answer": answers[0]["answer"], "answers": answers})
    return shown


def origin(records: list[StageRecord]) -> list[tuple[str, str]]:
    """Code, machine and packages of the run; several values where the stages differ."""

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(v) for v in values if v not in (None, "")))

    gpu_line = "{count} x {name}, driver {driver}, CUDA {cuda}"
    envs = [r.env for r in records]
    machines, packages = ([e.get(key, {}) for e in envs] for key in ("machine", "packages"))
    names = dict.fromkeys(name for p in packages for name in p)
    commits = [e["commit"][:12] + " (modified)" * bool(e.get("modified")) for e in envs if e.get("commit")]
    rows = [
        ("commit", all_of(commits) or "not a git checkout"),
        ("seed", all_of(r.seed for r in records)),
        ("processor", all_of(m.get("cpu") for m in machines)),
        ("cores", all_of(m.get("cores") for m in machines)),
        ("GPU", all_of(gpu_line.format(**m["gpu"]) for m in machines if "gpu" in m)),
        ("platform", all_of(m.get("platform") for m in machines)),
        ("python", all_of(e.get("python") for e in envs)),
        *((name, all_of(p.get(name) for p in packages)) for name in names),
    ]
    return [(key, value) for key, value in rows if value]
