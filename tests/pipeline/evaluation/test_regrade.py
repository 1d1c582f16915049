"""`grade` on an evaluation's folder; and verdicts against labels from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.settings.evaluate import EvaluateSettings
from tests import data


@pytest.fixture
def folder(stub, sums, tmp_path, scripted):
    """Five questions with two samples each: 1+1 right, 2+2 right once and without tags."""

    def says(question, sample):
        if question.startswith("f is"):
            return f"```python\ndef f(): return {2 + sample}\n```"
        return "<think>x</think><answer>2</answer>" if question.startswith("1+1") else f"It is {4 + sample}."

    scripted(says)
    out = tmp_path / "eval"
    evaluate(EvaluateSettings(model=stub(template="r1-zero-short"), benchmark=str(sums), out=out, samples=2))
    return out


def test_the_same_grader_gives_the_same_rows(folder, tmp_path, capsys):
    assert main(["grade", str(folder), str(tmp_path / "new")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"correct": 4, "incorrect": 6, "changed": 0, "pass@1": 0.4, "before": 0.4}
    assert (tmp_path / "new/generations.jsonl").read_bytes() == (folder / "generations.jsonl").read_bytes()
    new, old = (json.loads((f / "scores.json").read_text()) for f in (tmp_path / "new", folder))
    assert new.pop("graded_again") == {"mode": "lenient", "changed": 0} and new == old


def test_another_grader_changes_what_it_finds_otherwise(folder, tmp_path, capsys):
    """Strict: an answer without box or tags is none."""
    assert main(["grade", str(folder), str(tmp_path / "new"), "--mode", "strict"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out.splitlines()[-1])
    assert (told["changed"], told["correct"], told["pass@1"]) == (1, 3, 0.3)
    assert "1 of 10 verdicts changed" in said.err
    rows = [json.loads(line) for line in (tmp_path / "new/generations.jsonl").read_text().splitlines()]
    assert [r["verdict"] == "correct" for r in rows] == [True, True] + 6 * [False] + [True, False]
    assert rows[6]["detail"].startswith("prompt longer"), "what was not sampled stays as it is"
    assert json.loads((tmp_path / "new/scores.json").read_text())["pass@1"] == 0.3


def test_what_cannot_be_graded_again_is_named(folder, tmp_path, capsys):
    rows = (folder / "generations.jsonl").read_text().splitlines(keepends=True)
    new = tmp_path / "new"

    def refused(words, *flags):
        assert main(["grade", str(folder), str(new), *flags]) == 2
        assert words in capsys.readouterr().err and not new.exists()

    refused("--kind is for lines", "--kind", "math")
    (folder / "generations.jsonl").write_text("".join(rows[:7]))
    refused("7 rows, which are not 2 samples of each of 5 questions")
    lost = [json.dumps({k: v for k, v in json.loads(row).items() if k != "tests"}) + "\n" for row in rows]
    (folder / "generations.jsonl").write_text("".join(lost))
    refused("row 9: 'tests'")
    (folder / "generations.jsonl").write_text("".join(rows[:9] + rows[:1]))
    refused("10 rows, which are not 2 samples")
    (folder / "inputs.json").unlink()
    refused("is no folder of an evaluation")
    new.mkdir()
    (new / "mine").touch()
    assert main(["grade", str(folder), str(new)]) == 2 and "name a new folder" in capsys.readouterr().err


def test_a_graded_folder_is_no_evaluation_to_go_on_with(folder, tmp_path, sums):
    new = tmp_path / "new"
    assert main(["grade", str(folder), str(new), "--mode", "strict"]) == 0
    own = json.loads((folder / "inputs.json").read_text())["inputs"]
    with pytest.raises(UserError, match="holds completions graded again"):
        evaluate(EvaluateSettings(model=Path(own["model"]), benchmark=str(sums), out=new, samples=2))


# ---- agreement with labels from elsewhere


def rows(name):
    try:
        return data.rows(name)
    except UserError as missing:
        pytest.skip(str(missing))


def share_right(scripted, stub, tmp_path, name, texts):
    """pass@1 of an evaluation whose completions are `texts`, by question."""
    scripted(lambda question, sample: texts[question])
    model = stub(template="raw")
    (model / "config.json").write_text('{"model_type": "deepseek_v3", "max_position_embeddings": 100000}')
    own = {"model": model, "benchmark": name, "data": data.FOLDER, "temperature": 0.0}
    return evaluate(EvaluateSettings(**own, out=tmp_path / "out"))["pass@1"]


@pytest.mark.parametrize("name", ["math500", "gsm8k_test"])
def test_published_solutions_score_as_they_are_labelled(scripted, stub, tmp_path, name):
    """Two of three questions get their own solution, the third that of another question with another
    answer: pass@1 is within half a point of the share of own solutions."""
    asked = rows(name)
    texts, right = {}, 0
    for i, row in enumerate(asked):
        other = next(r for r in asked[i - 7 :: -1] if r["answer"] != row["answer"])
        texts[row["problem"]] = (row if i % 3 else other)["solution"]
        right += bool(i % 3)
    got = share_right(scripted, stub, tmp_path, name.removesuffix("_test"), texts)
    assert got == pytest.approx(right / len(asked), abs=0.005)


@pytest.mark.parametrize(
    "model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
)
def test_labelled_completions_of_public_models(scripted, stub, tmp_path, model):
    """The completions of openai/grade-school-math (data/example_model_solutions.jsonl, MIT), with its labels,
    where R1_DATA has that file."""
    labelled = rows("example_model_solutions")
    texts = {row["question"]: row[model]["solution"] for row in labelled}
    got = share_right(scripted, stub, tmp_path, "gsm8k", texts)
    assert got == pytest.approx(sum(row[model]["is_correct"] for row in labelled) / len(labelled), abs=0.005)
