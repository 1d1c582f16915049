"""Decontamination: what is left out in whatever words stand around it, what stays, and in which stages."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.corpus import traces
from pipeline.data.corpus import Row, to_row
from pipeline.data.decontaminate import Questions, decontaminate
from pipeline.data.pool import apart, pooled
from pipeline.data.problems import problems
from pipeline.errors import UserError
from pipeline.settings.distill import DistillSettings
from pipeline.settings.rollouts import GeneratingSettings
from pipeline.settings.supervised import SftSettings
from pipeline.stages.sft import gather
from rollout.text.tokenizer import train_tokenizer
from rollout.types import Problem
from tests.data import FOLDER as SHARED

needs_data = pytest.mark.skipif(
    not (SHARED / "math500.jsonl").is_file(),
    reason="no benchmark files: set R1_DATA to a folder that has them",
)
BENCHMARKS = (
    "math500", "aime24", "aime25", "amc23", "gsm8k", "olympiadbench", "minerva_math", "humaneval", "mbpp",
)  # fmt: skip


def question(text: str) -> Problem:
    return Problem(id=text, kind="math", question=text, answer="1", source="file")


@dataclass
class Run:
    """What `apart` and its callers need of a run directory."""

    noted: dict[str, Any] = field(default_factory=dict)
    stage: Any = field(default_factory=lambda: SimpleNamespace(name="stage"))

    def note(self, name: str, value: object) -> None:
        self.noted[name] = value

    def record_rows(self, name: str, rows: object) -> None: ...

    def corpus_input(self, value: str) -> str:
        return value


# ---- what is left out


BEFORE = "Solve the following problem, think step by step, and put your final answer in a box at the end."
AFTER = "Check your result twice before you give it, and do not use a calculator for any of the steps."
FEW_SHOT = "Question: What is the sum of the first ten odd numbers?\nAnswer: 100\n\nQuestion: {}\nAnswer:"
WRAPPED = {
    "instruction": lambda text: f"{BEFORE}\n\n{text}\n\n{AFTER}",
    "few-shot": FEW_SHOT.format,
    "chat": lambda text: to_row({"messages": [
        {"role": "system", "content": "You are a careful tutor."}, {"role": "user", "content": f"Hi! {text}"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n1"},
    ]}, "chat", 0, Counter()).question,
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("way", WRAPPED)
def test_no_wrapped_problem_of_math500_is_kept(way: str) -> None:
    heldout = problems("math500", data_dir=SHARED)
    assert len(heldout) == 500
    assert decontaminate([question(WRAPPED[way](p.question)) for p in heldout], heldout) == []


@needs_data
def test_little_of_math_train_is_left_out_beyond_the_published_list() -> None:
    """contamination.jsonl was computed apart from us, as a share of the longer of the two problems."""
    listed = [json.loads(line) for line in (SHARED / "contamination.jsonl").read_text().splitlines()]
    want = {p["train_id"] for p in listed if p["eval_file"] == "math500.jsonl"}
    train = problems("math_train", data_dir=SHARED)
    heldout = [p for name in BENCHMARKS for p in problems(name, data_dir=SHARED)]
    dropped = {p.id for p in train} - {p.id for p in decontaminate(train, heldout)}
    assert len(want) > 20 and want <= dropped
    assert len(dropped - want) <= 0.002 * len(train), sorted(dropped - want)


def test_a_short_problem_counts_where_all_its_words_and_signs_stand() -> None:
    heldout = [question("Compute $3 + 4$.")]
    held = ["compute 3+4", "Now, compute $3 + 4$; then rest.", "Task 1. Compute 3 + 4"]
    others = ["Compute 3 - 4", "Compute 3 + 42", "Recompute 3 + 4", "What is 3 + 4.5?", "", "Compute"]
    kept = decontaminate(map(question, held + others), heldout)
    assert [p.question for p in kept] == others
    assert Questions(["Compute $3 + 4$."]).held_by("compute 3+4") == ({0}, set())
    assert Questions(["$ $", ""]).held_by("anything") == (set(), set())


def test_copies_are_dropped_and_other_problems_kept():
    story = "With {} apples Tom goes to the big market in the old town every morning, come rain or shine"
    heldout = [question("What is $3 + 4$?"), question(story.format(5))]
    copies = [question("what is 3+4 ?"), question(story.format(5)), question(story.format(8))]
    others = [
        question("What is 3-4?"),
        question("What is 3 + 4.5?"),
        question("With 5 apples Tom goes home"),
    ]
    assert decontaminate(copies + others, heldout) == others
    assert decontaminate(others, []) == others


def test_half_of_the_ngrams_of_one_problem_is_the_border():
    """15 words have 6 10-grams. Changing the last word but 2, 3 and 4 leaves 3, 2 and 1 of them."""
    words = [f"w{i}" for i in range(15)]
    heldout = [question(" ".join(words))]

    def changed(place: int) -> Problem:
        return question(" ".join(w if i != place else "other" for i, w in enumerate(words)))

    assert decontaminate([changed(12)], heldout) == []
    assert decontaminate([changed(11)], heldout) == [changed(11)]


# ---- where: `pooled` serves every stage that samples, `gather` sft and sft2, `traces` the students

HELD = "Please tell me: with 5 apples Tom goes to the big market in the old town every morning. How many?"
ANSWER = {"answer": "8"}
OTHER = "How many apples does Tom have, if he had seven of them and then gave four of those to Ann?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One benchmark, and files of problems and of traces that hold its problem beside another."""
    bench = {
        "problem": "With 8 apples Tom goes to the big market in the old town every morning.",
        "answer": "8",
    }
    (tmp_path / "math500.jsonl").write_text(json.dumps(bench))
    rows = [{"id": f"{i}", "problem": text, "answer": "3"} for i, text in enumerate([HELD, OTHER])]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trace = "<think>\nIt is 3.\n</think>\n<answer>3</answer>"
    kept = [{"question": row["problem"], "completion": trace, "answer": "3"} for row in rows]
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, kept)))
    return tmp_path


def of_stage(stage: str, folder: Path, run: Any) -> list[str]:
    """The questions that a stage would train on."""
    about: dict[str, Any] = {"data": folder, "heldout": ("math500", "aime24")}
    if stage == "sampling":
        generating = GeneratingSettings(problems=(str(folder / "problems.jsonl"),), template="raw", **about)
        tokenizer = train_tokenizer([HELD], vocab_size=300)
        return [p.question for p in pooled(generating, tokenizer, None, 0, run)]
    if stage == "sft":
        sft = SftSettings(corpus=str(folder / "traces.jsonl"), curated=2, **about)
        return [row.question for row in gather(sft, run) if "generator:" not in row.source]
    return [
        row.question for row in traces(DistillSettings(corpus=(str(folder / "traces.jsonl"),), **about), run)
    ]


@pytest.mark.parametrize("stage", ["sampling", "sft", "distill"])
def test_stages_leave_out_what_holds_a_benchmarks_problem_and_say_so(
    stage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run()
    assert of_stage(stage, folder, run) == [OTHER]
    told = "1 of 2 problems hold one of math500; not compared with aime24 ("
    assert f"stage: left out: {told}" in capsys.readouterr().out
    assert run.noted["decontamination"].startswith(told)


def test_without_benchmarks_nothing_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    run, rows = Run(), [Row("1", "3+4=?", "7")]
    assert list(apart(rows, SftSettings(curated=1, heldout=()), run)) == rows  # type: ignore[arg-type]
    assert (capsys.readouterr().out, run.noted) == ("", {})


def test_generated_problems_need_no_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    run, rows = Run(), [Row("1", "3+4=?", "7", source="reject:generator:tiny")]
    assert list(apart(rows, SftSettings(curated=1), run)) == rows  # type: ignore[arg-type]
    assert (capsys.readouterr().out, run.noted) == ("", {})


def test_nothing_left_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="all 1 of 1 problems hold one of math500"):
        list(apart([question(HELD)], SftSettings(curated=1, data=folder, heldout=("math500",)), Run()))  # type: ignore[arg-type]
