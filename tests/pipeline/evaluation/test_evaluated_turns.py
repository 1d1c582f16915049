"""Evaluations of models whose turns an environment answers."""

from __future__ import annotations

import json

import pytest

from pipeline.__main__ import main
from pipeline.errors import Stopped
from pipeline.evaluation.evaluate import evaluate
from pipeline.settings.evaluate import EvaluateSettings

OWN = """
def play(problem):
    def step(messages):
        if problem.question.startswith("BAD"):
            raise KeyError("board")
        return "(seen)" * 3 if len(messages) < 6 else None
    return step

play.stop = tuple("e1uao+=")
"""


@pytest.fixture
def real(checkpoint, tmp_path, monkeypatch):
    """`real(out, **changes)`: an evaluation with an environment in 3 parts of 2 questions, 2 samples each."""
    (tmp_path / "r1_evaluated_turns.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def config(out, **changes):
        return EvaluateSettings(**{
            "model": checkpoint, "benchmark": "generator:sum", "limit": 6, "samples": 2, "save_every": 4,
            "max_tokens": 60, "threads": 1, "out": tmp_path / out, "temperature": 1.0, "top_p": 1.0,
            "environment": "r1_evaluated_turns:play", **changes,
        })  # fmt: skip

    return config


def rows_of(folder):
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def test_turns_are_played_kept_and_shown(real, tmp_path, capsys):
    result = evaluate(real("a"))
    rows = [row for row in rows_of(tmp_path / "a") if "turns" in row]
    assert rows and result["inputs"]["environment"] == "r1_evaluated_turns:play"
    for row in rows:
        assert [who for who, _ in row["turns"]][:2] == ["model", "environment"]
        assert "(seen)" in row["turns"][1][1] and "(seen)" not in row["text"]
    other = evaluate(real("b", environment=""))
    assert "environment" not in other["inputs"] and not any("turns" in row for row in rows_of(tmp_path / "b"))
    evaluate(real("c", max_turns=2))
    assert all(len(row.get("turns", [])) <= 3 for row in rows_of(tmp_path / "c"))
    first, second = (json.loads((tmp_path / name / "inputs.json").read_text())["inputs"] for name in "ac")
    assert (first["max_turns"], second["max_turns"]) == (4, 2)


def test_the_page_shows_what_the_environment_wrote():
    from pipeline.evaluation.compare import shown_sample
    from pipeline.report.template import render

    row = {"text": "<think>a b</think>c", "tokens": 5, "finish_reason": "stop", "verdict": "correct"}
    row |= {"sample": 0, "question": "q", "answer": "c", "id": "x", "detail": ""}
    several = row | {"turns": [["model", "a"], ["environment", "<7>"], ["model", "b</think>c"]]}
    shown = [((0, 1), [shown_sample("A", row, 0, 1), shown_sample("B", several, 1, 1)])]
    page = render("scores.html.j2", title="t", lead="l", tables=[], changed=shown, left_out=[])
    assert '<span class="seen">&lt;7&gt;</span>' in page and '<span class="think">&lt;think&gt;a b' in page


def test_a_killed_evaluation_goes_on_to_the_same_bytes(real, tmp_path):
    evaluate(real("whole"))

    class Killed(Exception):
        pass

    def kill():
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            evaluate(real("parts"), pause=kill)
    evaluate(real("parts"))
    one, two = ((tmp_path / name / "generations.jsonl").read_bytes() for name in ("whole", "parts"))
    assert one == two


def test_a_rollout_that_the_context_cannot_hold_is_cut_and_the_others_go_on(real, tmp_path):
    """The model has 96 positions; a longer question leaves less room, and no observation takes it out."""
    lines = [{"question": "1+1=?" + " now" * n, "answer": "2"} for n in (0, 12, 16)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(real("out", benchmark="long.jsonl", limit=None, max_tokens=1_000, samples=8, save_every=64))
    rows = rows_of(tmp_path / "out")
    assert any("turns" in row for row in rows) and any(row["finish_reason"] == "length" for row in rows)


def test_a_failed_environment_is_no_wrong_answer_and_stays_failed(real, tmp_path):
    lines = [{"question": question, "answer": "2"} for question in ("1+1=?", "BAD 1+1=?")]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"benchmark": "two.jsonl", "limit": None, "samples": 8}
    result = evaluate(real("out", **config))
    failed = [row for row in rows_of(tmp_path / "out") if row["verdict"] == "error"]
    assert failed and result["verifier_failures"] == len(failed)
    assert {row["index"] for row in failed} == {1}
    assert failed[0]["failure"] == failed[0]["detail"] == "the environment failed: KeyError: 'board'"
    assert main(["grade", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert [r["verdict"] for r in rows_of(tmp_path / "again")] == [
        r["verdict"] for r in rows_of(tmp_path / "out")
    ]
    with pytest.raises(Stopped, match="KeyError: 'board'"):
        evaluate(real("strict", max_error_share=0.01, **config))


def test_what_cannot_be_is_refused(real):
    with pytest.raises(ValueError, match="workers=2 must be 0 with an environment"):
        real("x", workers=2)
    with pytest.raises(ValueError, match="needs the model's tokens"):
        real("x", engine="endpoint")
