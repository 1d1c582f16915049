"""`doctor`: each kind is named in a faulty dump of each shape, and none in its sound twin."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.__main__ import main
from pipeline.doctor.findings import ADVICE
from pipeline.doctor.read import Dump
from pipeline.doctor.rollouts import collapse
from tests.pipeline.doctor.dumps import BESIDE, FAULTS, SHAPES, ours, sound


@pytest.fixture
def doctor(capsys, monkeypatch):
    """`doctor(path, *flags)`: kinds that the command finds, from its last line."""
    monkeypatch.delenv("R1_DATA", raising=False)

    def run(path, *flags):
        assert main(["doctor", str(path), *map(str, flags)]) == 0
        findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
        assert all(set(each) == {"kind", "evidence", "advice"} for each in findings)
        assert all(re.search(r"\d", each["evidence"]) and each["advice"] for each in findings)
        return [each["kind"] for each in findings]

    return run


def test_every_kind_of_the_contract_has_a_fault_here():
    assert {*FAULTS, "contamination"} == set(ADVICE)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sound_dump_has_no_finding(doctor, tokenizer, checkpoint, tmp_path, shape):
    for seed in range(4):
        (folder := tmp_path / str(seed)).mkdir()
        path = SHAPES[shape](sound(tokenizer, seed), folder)
        assert doctor(path) == doctor(path, "--model", checkpoint) == [], seed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_named_and_no_other(doctor, tokenizer, checkpoint, tmp_path, kind, shape):
    for seed in range(10, 12):
        rows = sound(tokenizer, seed)
        FAULTS[kind](rows, tokenizer)
        (folder := tmp_path / str(seed)).mkdir()
        path = SHAPES[shape](rows, folder)
        found = doctor(path, "--model", checkpoint)
        assert kind in found
        assert set(found) <= {kind, *BESIDE.get(kind, ())}
        words = {"retokenised", "eos", "template"}
        assert set(doctor(path)) == set(found) - words, "without the model no word of it is claimed"


def test_a_problem_of_a_benchmark_in_a_prompt_is_contamination(doctor, tokenizer, tmp_path):
    asked = "A baker sells 48 rolls in April and half as many in May; how many rolls did she sell altogether?"
    (data := tmp_path / "data").mkdir()
    (data / "math500.jsonl").write_text(json.dumps({"problem": asked, "answer": "72"}) + "\n")
    rows = sound(tokenizer, 3)
    path = ours(rows, tmp_path)
    assert doctor(path, "--data", data) == []
    rows[5]["prompt"] = f"Solve this and box the answer. {asked} Think first."
    assert doctor(ours(rows, tmp_path), "--data", data) == ["contamination"]
    assert doctor(path) == []  # nothing to compare with


def test_a_policy_that_asks_its_environment_less_has_not_collapsed():
    """Lengths are of what the model wrote: 44 and later 40 tokens."""
    rows = [{"step": float(i), "rollout/tokens_mean": 244.0, "rollout/observed": 200.0} for i in range(4)]
    rows += [{"step": float(i), "rollout/tokens_mean": 40.0} for i in range(4, 8)]
    assert collapse(Dump(metrics=rows), rows) == []
    short = [row | {"rollout/tokens_mean": 12.0} if row["step"] > 3 else row for row in rows]
    assert [found.kind for found in collapse(Dump(metrics=short), short)] == ["length_collapse"]


def test_rewards_that_fall_to_zero_and_failures_with_a_zero_are_silent(doctor, tokenizer, tmp_path):
    rows = sound(tokenizer, 4)
    for row in rows:
        row["reward"] *= row["step"] < 4
    assert "silent_zero" in doctor(ours(rows, tmp_path))
    rows = sound(tokenizer, 4)
    for row in rows[::7]:
        row |= {"reward": 0.0, "error": "timeout"}
    assert doctor(ours(rows, tmp_path)) == ["silent_zero"]
    rows = sound(tokenizer, 4)
    for row in rows:
        row["parts"] = {"accuracy": row["reward"], "format": 0.0, "repetition": 0.0}
    assert doctor(ours(rows, tmp_path)) == ["silent_zero"], "a penalty of 0 is well"


def test_the_end_of_a_run_that_succeeds_is_no_fault(doctor, tokenizer, tmp_path):
    """Rewards rise to the best, groups lose their spread, completions their entropy."""
    rows = sound(tokenizer, 5)
    for row in rows:
        if row["step"] > 2:
            row["reward"] = 1.0
            row["logprobs"] = row["old_logprobs"] = [x / 50 for x in row["logprobs"]]
    assert doctor(ours(rows, tmp_path)) == []
    for row in rows:
        row["reward"] = 0.0 if row["step"] > 2 else row["reward"]  # and the same in failure
    assert {"flat_groups", "entropy_collapse"} <= set(doctor(ours(rows, tmp_path)))


def test_equal_completions_that_are_likely_are_no_duplicates(doctor, tokenizer, tmp_path):
    """All of a group are equal, and each has a probability of 0.9."""
    rows = sound(tokenizer, 6)
    for first in range(0, len(rows), 6):
        for row in rows[first : first + 6]:
            row |= {key: rows[first][key] for key in ("completion", "completion_ids")}
            count = len(row["completion_ids"])
            row["logprobs"] = row["old_logprobs"] = [-0.1 / count] * count
    assert doctor(ours(rows, tmp_path)) == []
    for row in rows:
        row["logprobs"] = row["old_logprobs"] = [20 * x for x in row["logprobs"]]
    assert doctor(ours(rows, tmp_path)) == ["duplicates"]


def test_a_gap_that_begins_with_the_updates_is_stale(doctor, tokenizer, tmp_path):
    """The same small noise is rounding where it is there from the start."""
    rows = sound(tokenizer, 7)
    FAULTS["precision"](rows, tokenizer)
    assert doctor(ours(rows, tmp_path)) == ["precision"]
    for row in rows[:24]:
        row["old_logprobs"] = row["logprobs"]
    assert doctor(ours(rows, tmp_path)) == ["stale_weights"]


@pytest.mark.parametrize("loss", [{2: 0.4, 8: 0.4}, {2: 0.4, 8: 0.31}])
def test_a_loss_that_depends_on_the_number_of_micro_batches(doctor, tokenizer, tmp_path, loss):
    rows = sound(tokenizer, 8)
    for row, count in zip(rows, [2, 8] * len(rows), strict=False):
        row |= {"micro_batches": count, "loss": loss[count]}
    assert doctor(ours(rows, tmp_path)) == ["micro_batch_loss"] * (loss[8] != 0.4)


def test_the_trainer_scores_equal_rollouts_alike(doctor, tokenizer, tmp_path):
    rows = sound(tokenizer, 9)
    twin = rows[0] | {"old_logprobs": [x - 0.05 for x in rows[0]["logprobs"]]}
    assert "micro_batch_loss" in doctor(ours([*rows, twin], tmp_path))


def test_a_completion_that_goes_on_behind_its_end(doctor, tokenizer, checkpoint, tmp_path):
    rows = sound(tokenizer, 9)
    for row in rows[::5]:
        row["completion_ids"][4] = tokenizer.eos_token_id
        row["completion"] = tokenizer.decode(row["completion_ids"][:-1], skip_special_tokens=True)
    assert doctor(ours(rows, tmp_path), "--model", checkpoint) == ["eos"]


# ---- what a user can supply


def test_lines_that_cannot_be_read_are_counted_and_named(doctor, capsys, tokenizer, tmp_path):
    rows = sound(tokenizer, 1)
    rows[0]["logprobs"][2] = float("nan")
    rows[1]["old_logprobs"].pop()
    path = ours(rows, tmp_path)
    path.write_bytes(
        path.read_bytes() + b'{"prompt": 1\n[1]\n{"step": 3}\n\xff\n\n' + b'{"completion": "\\ud800"}\n'
    )
    assert main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {"findings": []}
    for reason in ("not a line of JSON", "found list", "no completion", "not finite", "differ in number"):
        assert reason in out
    assert f"{path}:147" in out  # where the first such line stands


@pytest.mark.parametrize("content", ["", "\n", "{}\n", "nonsense", '{"step": 1}\n{"prompt": "a"}\n'])
def test_nothing_to_read_is_one_line(capsys, tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    for path in (tmp_path / "a.jsonl", tmp_path):
        assert main(["doctor", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no rollout that can be read" in error


def test_wrong_paths_are_one_line(capsys, tokenizer, tmp_path):
    (tmp_path / "run" / "zero").mkdir(parents=True)
    (tmp_path / "run" / "zero" / "metrics.jsonl").touch()
    path = ours(sound(tokenizer, 1), tmp_path)
    for argv, said in (
        ([tmp_path / "none.jsonl"], "No such file"),
        ([tmp_path / "run"], "name one of its stages: zero"),
        ([path, "--model", tmp_path], "no tokenizer"),
        ([path, "--data", tmp_path / "none"], "no folder"),
    ):
        assert main(["doctor", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error


def test_of_a_large_dump_complete_groups_are_kept(doctor, capsys, monkeypatch, tokenizer, tmp_path):
    rows = sound(tokenizer, 2)
    FAULTS["duplicates"](rows, tokenizer)
    monkeypatch.setattr("pipeline.doctor.read.MOST_TOKENS", 3_000)
    assert main(["doctor", str(ours(rows, tmp_path))]) == 0
    out = capsys.readouterr().out
    assert re.search(r"one in [48] groups", out) and '"kind": "duplicates"' in out
    assert int(re.search(r"(\d+) rollouts", out)[1]) % 6 == 0
