"""Worked solutions as traces, and the same questions without reasoning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.corpus import plain_rows, worked_rows
from pipeline.data.corpus import Row
from pipeline.data.rows import ALL_ROWS
from pipeline.data.solutions import read_solutions, worked_steps
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings
from rewards.maths.extract import final_answer
from rewards.style import in_format

CLIPS = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
GSM8K = {
    "id": "g/0",
    "problem": "How many clips?",
    "answer": "72",
    "solution": CLIPS,
    "source": "gsm8k_train",
}
BOXED = "Adding, we get $2+2=\\boxed{4}$.\n\nDone."
MATH = {"id": "m/0", "problem": "What is $2+2$?", "answer": "4", "solution": BOXED, "source": "math_train"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both training files."""
    (tmp_path / "gsm8k_train.jsonl").write_text(json.dumps(GSM8K) + "\n")
    (tmp_path / "math_train.jsonl").write_text(json.dumps(MATH) + "\n")
    return tmp_path


def test_gsm8k_loses_its_marks_and_gains_a_box() -> None:
    want = "Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips.\nThe answer is $\\boxed{72}$."
    assert worked_steps(CLIPS, "72") == want


def test_math_keeps_its_own_box() -> None:
    assert worked_steps(BOXED, "4") == "Adding, we get $2+2=\\boxed{4}$.\nDone."


@pytest.mark.parametrize("source", ["gsm8k_train", "math_train"])
def test_a_trace_grades_as_its_own_answer(folder: Path, source: str) -> None:
    (plain,) = worked_rows(read_solutions(source, folder, ALL_ROWS), tags=False)
    (tagged,) = worked_rows(read_solutions(source, folder, ALL_ROWS), tags=True)
    assert final_answer(plain.completion, "strict") == plain.answer
    assert final_answer(tagged.completion, "strict") == tagged.answer
    assert in_format(tagged.completion)
    assert (tagged.source, tagged.kind, tagged.language) == (source, "math", "en")


def test_a_problem_without_a_solution_teaches_nothing(folder: Path) -> None:
    ((problem, _),) = read_solutions("gsm8k_train", folder, ALL_ROWS)
    assert list(worked_rows([(problem, "")], tags=False)) == []


def test_a_bad_line_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "gsm8k_train.jsonl").open("a") as file:
        file.write(json.dumps({"problem": "no answer"}) + "\n")
    assert len(read_solutions("gsm8k_train", folder, ALL_ROWS)) == 1
    assert "left out 1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"gsm8k_train\.jsonl:2: no answer"):
        read_solutions("gsm8k_train", folder, RowSettings(max_bad_rows=0))


def test_plain_rows_drop_the_reasoning_and_nothing_else() -> None:
    trace = Row(id="a", question="3+4", completion="<think>\n3+4=7\n</think>\n<answer>7</answer>", answer="7")
    worked = Row(id="b", question="2+2", completion=BOXED, answer="4")
    silent = Row(id="c", question="?", completion="<think>\nhm\n</think>")
    assert [(row.question, row.completion) for row in plain_rows([trace, worked, silent])] == [
        ("3+4", "<answer>7</answer>"),
        ("2+2", "\\boxed{4}"),
    ]
