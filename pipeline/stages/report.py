"""Stage `report`: `runs/NAME/summary.json` for programs, `runs/NAME/report.html` for people.

It reads the other stages' directories and computes nothing anew, so it may be run at any time and again.
The page is one file: no network, no script, all text escaped.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.arguments import StageConfig, to_toml
from pipeline.errors import UserError
from pipeline.report.plots import Box, Series, chain, line_chart, share
from pipeline.run.directory import RunDir, write_atomic
from pipeline.run.metrics import GLOSSARY, duration, glossary_of, read_jsonl, say
from pipeline.stages.evaluate import print_table
from pipeline.table import STAGES

KEYS = ("pass@1", "n", "interval", "format_rate", "language_consistency", "mean_tokens")
"""What summary.json holds of each model's scores on a benchmark."""

TITLES = {
    "pretrain": "base",
    "zero": "R1-Zero",
    "sft": "Dev1",
    "grpo": "Dev2",
    "reject": "corpus",
    "sft2": "Dev3",
    "grpo2": "R1",
    "distill": "students",
}
"""What each stage makes, in the paper's words (arXiv:2501.12948, Fig. 2)."""

COLORS = {stage: f"var(--s{i})" for i, stage in enumerate(TITLES)}

RL_CHARTS = (
    ("heldout/pass@1", 0.0, 1.0),
    ("reward/accuracy", 0.0, 1.0),
    ("reward/mean", 0.0, None),
    ("rollout/tokens_mean", 0.0, None),
    ("reward/format", 0.0, 1.0),
    ("reward/language", None, 1.0),
    ("policy/entropy", 0.0, None),
    ("policy/mismatch_kl", 0.0, None),
)
LOSS_CHARTS = (("pretrain", ("pretrain",)), ("fine-tuning", ("sft", "sft2", "distill")))

SCORE_GLOSSARY = {
    "pass@1": "accuracy: mean over questions of the share of right samples (greedy: share of right answers)",
    "95 % interval": "over questions: Wilson for one sample a question, normal over their means for several",
    "format": "share of completions in R1's form: one think block, then one answer block, nothing else",
    "language": "mean share of words in the question's language",
    "tokens": "mean completion length, tokens",
    "cut": "share of completions that ended at the token limit",
    "failed": "completions whose verifier failed; they count as not right",
    "pass@k": "chance that one of k samples is right, unbiased (arXiv:2107.03374, Eq. 1)",
    "cons@k": "accuracy of the most frequent answer of k samples, mathematics only",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(StageConfig):
    """Write summary.json and report.html of a run."""

    transcripts: int = 4
    """Held-out problems whose completions are shown side by side, evenly spaced through the set."""
    transcript_models: tuple[str, ...] = ("base", "zero", "r1")
    """Labels of the models whose completions are shown."""

    def __post_init__(self) -> None:
        if self.transcripts < 0:
            raise ValueError(f"transcripts={self.transcripts} must be at least 0.")


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage left in its directory."""

    name: str
    title: str
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    seconds: float | None
    """`None` where it has not finished."""
    peak_rss_bytes: int
    seed: int | None

    @property
    def took(self) -> str:
        """Its seconds, readable."""
        return "not finished" if self.seconds is None else duration(self.seconds)

    @property
    def settings(self) -> str:
        """Its resolved settings as TOML."""
        return to_toml(self.config)


def run(config: Config, run_dir: RunDir) -> None:
    """The stage."""
    folder = run_dir.path.parent
    scores_file = folder / "eval" / "scores.json"
    if not scores_file.is_file():
        raise UserError(f"no {scores_file}; score the models first: make eval ARGS='--name {config.name}'")
    state = json.loads(scores_file.read_text(encoding="utf-8"))
    records = read_stages(folder)
    summary = summarise(state, records, config.seed)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomic(run_dir.path / "report.html", page(config, state, records, summary, folder))
    partial = folder / "report.html.tmp"
    shutil.copyfile(run_dir.path / "report.html", partial)
    partial.replace(folder / "report.html")
    print_table(state)
    say(f"summary: {folder / 'summary.json'}")
    say(f"report: {folder / 'report.html'}")


# ---- what there is


def read_stages(folder: Path) -> list[StageRecord]:
    """The stages of the run that were begun, in the chain's order, this one left out."""
    found = []
    for stage in STAGES:
        path = folder / stage.name
        if stage.name == "report" or not (path / "config.toml").is_file():
            continue
        done = read_json(path / "done.json")
        found.append(
            StageRecord(
                name=stage.name,
                title=TITLES.get(stage.name, ""),
                config=tomllib.loads((path / "config.toml").read_text(encoding="utf-8")),
                env=read_json(path / "env.json"),
                metrics=read_jsonl(path / "metrics.jsonl"),
                seconds=done.get("seconds"),
                peak_rss_bytes=done.get("peak_rss_bytes", 0),
                seed=done.get("seed"),
            )
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def summarise(state: dict[str, Any], records: list[StageRecord], seed: int) -> dict[str, Any]:
    """The contract of summary.json: scores by model and benchmark, seconds, peak memory, seed.

    Args:
        state: eval's scores.json.
        records: stages; their seconds are added, the largest peak counts.
        seed: for a run without a finished stage.
    """
    seeds = [r.seed for r in records if r.seed is not None]
    return {
        "models": {
            label: {name: {key: s[key] for key in KEYS} for name, s in by_benchmark.items()}
            for label, by_benchmark in state["scores"].items()
        },
        "seconds": round(sum(r.seconds or 0.0 for r in records), 2),
        "peak_rss_bytes": max((r.peak_rss_bytes for r in records), default=0),
        "seed": seeds[0] if seeds else seed,
        "not_made": state["not_made"],
        "not_scored": state["not_scored"],
        "stages": {r.name: {"seconds": r.seconds, "peak_rss_bytes": r.peak_rss_bytes} for r in records},
    }


# ---- the page


def page(
    config: Config, state: dict[str, Any], records: list[StageRecord], summary: dict[str, Any], folder: Path
) -> str:
    """The whole page as text."""
    main = main_benchmark(state)
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    boxes, edges = chain_of(state, records, main)
    known = {key: line for r in records for key, line in glossary_of(folder / r.name).items()}
    used = sorted({key for r in records for row in r.metrics for key in row if key in known})
    own = [(key, None, None) for key in used if key not in GLOSSARY]
    return env.get_template("page.html.j2").render(
        name=config.name,
        main=main,
        tiles=tiles(state, summary, main),
        chain_wide=chain(boxes, edges, upright=False) if boxes else "",
        chain_tall=chain(boxes, edges, upright=True) if boxes else "",
        tables=tables(state),
        not_made=state["not_made"],
        not_scored=state["not_scored"],
        rl=[
            {"key": key, "what": known[key], "svg": svg}
            for key, low, high in (*RL_CHARTS, *own)
            if (svg := line_chart(key, curves(rl_stages(records), (key,)), low, high))
        ],
        losses=[
            {
                "key": f"{name}: loss",
                "what": "next-token cross-entropy, nats a token",
                "svg": svg,
                "stages": some,
            }
            for name, names in LOSS_CHARTS
            if (some := [r for r in records if r.name in names])
            and (svg := line_chart(name, curves(some, ("loss/lm", "loss/total")), 0.0))
        ],
        rl_stages=rl_stages(records),
        colors=COLORS,
        transcripts=transcripts(config, state, main, folder),
        records=records,
        environment=environment(records),
        summary=summary,
        total=duration(summary["seconds"]),
        glossary={**SCORE_GLOSSARY, **{key: known[key] for key in used}},
    )


def main_benchmark(state: dict[str, Any]) -> str:
    """The benchmark of the headline: `heldout`, or else the first there is."""
    names = list(dict.fromkeys(name for by_benchmark in state["scores"].values() for name in by_benchmark))
    return "heldout" if "heldout" in names or not names else names[0]


def score_of(state: dict[str, Any], label: str, main: str) -> dict[str, Any] | None:
    """A model's scores on the main benchmark."""
    found: dict[str, Any] | None = state["scores"].get(label, {}).get(main)
    return found


def tiles(state: dict[str, Any], summary: dict[str, Any], main: str) -> list[dict[str, str]]:
    """The headline: what each method reached, and what it cost."""
    shown = []
    for label, title in (("base", "base"), ("zero", "R1-Zero"), ("r1", "R1"), ("student", "student")):
        if s := score_of(state, label, main):
            low, high = s["interval"]
            note = f"{100 * low:.0f} to {100 * high:.0f} %"
            if label == "student" and (plain := score_of(state, "student_plain", main)):
                note += f"; plain {share(plain['pass@1'])}"
            shown.append({"title": title, "value": share(s["pass@1"]), "note": note})
    finished = sum(stage["seconds"] is not None for stage in summary["stages"].values())
    gib = summary["peak_rss_bytes"] / 2**30
    shown.append({"title": "time", "value": duration(summary["seconds"]), "note": f"{finished} stages"})
    shown.append({"title": "peak memory", "value": f"{gib:.1f} GiB", "note": "of the largest stage"})
    return shown


def chain_of(
    state: dict[str, Any], records: list[StageRecord], main: str
) -> tuple[list[Box], list[tuple[str, str]]]:
    """Boxes and edges of the picture: every stage of the chain, made or not."""
    begun = {r.name: r for r in records}
    boxes = []
    for stage, title in TITLES.items():
        labels = [label for label, m in state["models"].items() if m["from"].split("/")[0] == stage]
        values = tuple(
            (label, s["pass@1"] if (s := score_of(state, label, main)) else None) for label in labels
        )
        kept = (
            [row["data/kept"] for row in begun[stage].metrics if "data/kept" in row] if stage in begun else []
        )
        note = (
            f"kept {100 * sum(kept) / len(kept):.0f} %" if kept else "" if stage in begun else "not made yet"
        )
        boxes.append(Box(stage, title, values, note))
    edges = [(before, stage.name) for stage in STAGES if stage.name in TITLES for before in stage.after]
    return boxes, edges


def tables(state: dict[str, Any]) -> list[dict[str, Any]]:
    """One table a benchmark, its rows in the order of the chain."""
    names = list(dict.fromkeys(name for by_benchmark in state["scores"].values() for name in by_benchmark))
    return [
        {
            "name": name,
            "rows": [(label, s[name]) for label, s in state["scores"].items() if name in s],
            "sampled": any(s[name]["k"] > 1 for s in state["scores"].values() if name in s),
        }
        for name in names
    ]


def rl_stages(records: Iterable[StageRecord]) -> list[StageRecord]:
    """The stages that drew and trained on rollouts; rejection sampling draws, but has no policy to train."""
    return [r for r in records if any("reward/mean" in row for row in r.metrics)]


def curves(records: Iterable[StageRecord], keys: tuple[str, ...]) -> list[Series]:
    """The first of `keys` that each stage logged, over its steps."""
    found = []
    for record in records:
        key = next((k for k in keys if any(k in row for row in record.metrics)), None)
        if key is not None:
            points = tuple((float(row["step"]), float(row[key])) for row in record.metrics if key in row)
            found.append(Series(record.name, COLORS.get(record.name, "currentColor"), points))
    return found


_THINK = re.compile(r"\A(\s*(?:<think>)?.*?</think>)(.*)\Z", re.DOTALL)


def transcripts(config: Config, state: dict[str, Any], main: str, folder: Path) -> list[dict[str, Any]]:
    """The same held-out problems as several models answered them, first samples, not chosen by outcome."""
    rows = {
        label: {row["index"]: row for row in read_jsonl(file) if row["sample"] == 0}
        for label in config.transcript_models
        if label in state["scores"]
        and (file := folder / "eval" / label / main / "generations.jsonl").is_file()
    }
    if not rows or not config.transcripts:
        return []
    common = sorted(set.intersection(*(set(by_index) for by_index in rows.values())))
    count = min(config.transcripts, len(common))
    shown = []
    for index in (common[i * len(common) // count] for i in range(count)):
        answers = []
        for label, by_index in rows.items():
            row = by_index[index]
            split = _THINK.match(row["text"])
            think, rest = split.groups() if split else ("", row["text"])
            answers.append({"label": label, "think": think, "rest": rest, **row})
        shown.append({"question": answers[0]["question"], "answer": answers[0]["answer"], "answers": answers})
    return shown


def environment(records: list[StageRecord]) -> list[tuple[str, str]]:
    """Where and with what the run was made; several values where the stages differ."""

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(v) for v in values if v not in (None, "")))

    envs = [r.env for r in records]
    commits = [
        e.get("commit", "")[:12] + (" (modified)" if e.get("modified") else "")
        for e in envs
        if e.get("commit")
    ]
    rows = [
        ("commit", all_of(commits) or "not a git checkout"),
        ("seed", all_of(r.seed for r in records)),
        ("processor", all_of(e.get("machine", {}).get("cpu") for e in envs)),
        ("cores", all_of(e.get("machine", {}).get("cores") for e in envs)),
        ("platform", all_of(e.get("machine", {}).get("platform") for e in envs)),
        ("python", all_of(e.get("python") for e in envs)),
    ]
    packages = list(dict.fromkeys(name for e in envs for name in e.get("packages", {})))
    rows += [(name, all_of(e.get("packages", {}).get(name) for e in envs)) for name in packages]
    return [(key, value) for key, value in rows if value]
