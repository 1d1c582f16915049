"""The stage: labels to models, kept and new pairs, what is missing said aloud."""

from __future__ import annotations

import json

import pytest

from pipeline.__main__ import main
from pipeline.settings.evaluate import EvalSettings

RIGHT = "<think>\nsum\n</think>\n<answer>\n2\n</answer>"


@pytest.fixture
def run(tmp_path, sums, monkeypatch):
    """`run(*flags)`: the stage `eval` of a run `t`, on the sums, from the command line."""
    monkeypatch.delenv("R1_DATA", raising=False)
    file = tmp_path / "eval.toml"
    file.write_text(f'benchmarks = ["sums={sums}"]\nextra_benchmarks = ["math500"]\nmax_tokens = 40\n')

    def call(*flags):
        base = ["eval", "--config", str(file), "--name", "t", "--runs", str(tmp_path / "runs")]
        return main([*base, "--data", str(tmp_path), *flags])

    return call


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("pipeline.data.hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # put back afterwards


def state(tmp_path):
    return json.loads((tmp_path / "runs/t/eval/scores.json").read_text())


def test_all_that_is_there_is_scored_and_the_rest_is_listed(run, stub, scripted, tmp_path, capsys):
    scripted(lambda question, sample: RIGHT)
    stub("runs/t/pretrain/model", template="r1-zero-short")
    stub("runs/t/distill/student/model", template="r1-zero-short")
    assert run() == 0
    got = state(tmp_path)
    assert list(got["scores"]) == ["base", "student"]
    assert got["scores"]["base"]["sums"]["pass@1"] == pytest.approx(1 / 5)
    assert got["models"]["student"]["from"] == "distill/student"
    assert got["not_made"]["zero"] == "not made yet: make zero ARGS='--name t'"
    assert "math500.jsonl" in got["not_scored"]["math500"] and "hub" in got["not_scored"]["math500"]
    assert (tmp_path / "runs/t/eval/base/sums/generations.jsonl").exists()
    said = capsys.readouterr().out
    assert "not made yet: make grpo2" in said and "math500: not scored:" in said and "20.0 %" in said


def test_run_again_it_keeps_what_holds_and_adds_what_is_new(run, stub, scripted, tmp_path, capsys):
    engines = scripted(lambda question, sample: RIGHT)
    base = stub("runs/t/pretrain/model", template="r1-zero-short")
    assert run() == 0 and len(engines) == 1
    done = json.loads((tmp_path / "runs/t/eval/done.json").read_text())
    stub("runs/t/zero/model", template="r1-zero-short")
    capsys.readouterr()
    assert run() == 0 and len(engines) == 2
    assert capsys.readouterr().out.count("kept: nothing changed") == 1
    assert list(state(tmp_path)["scores"]) == ["base", "zero"]
    assert json.loads((tmp_path / "runs/t/eval/done.json").read_text())["seconds"] >= done["seconds"]

    (base / "weights").write_text("trained on")
    assert run() == 0 and len(engines) == 3, "only the changed model is scored again"
    assert run("--samples", "2") == 0 and len(engines) == 5
    assert state(tmp_path)["scores"]["base"]["sums"]["k"] == 2
    assert "samples = 2" in (tmp_path / "runs/t/eval/config.toml").read_text()


def test_finished_scores_stay_until_new_ones_are_complete(run, stub, scripted, tmp_path, capsys):
    """A model that changed and then cannot be sampled costs no score that there was."""
    scripted(lambda question, sample: RIGHT)
    base = stub("runs/t/pretrain/model", template="r1-zero-short")
    assert run() == 0
    pair = tmp_path / "runs/t/eval/base/sums"
    before = {file.name: file.read_bytes() for file in pair.iterdir()}
    assert set(before) == {"inputs.json", "generations.jsonl", "scores.json"}

    def broken(question, sample):
        raise FloatingPointError("logits are NaN")

    scripted(broken)
    (base / "weights").write_text("trained on")
    assert run() == 2 and "logits are NaN" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in pair.iterdir()} == before
    scripted(lambda question, sample: "wrong")
    assert run() == 0
    assert (pair / "generations.jsonl").read_bytes() != before["generations.jsonl"]
    assert [folder.name for folder in pair.parent.iterdir()] == ["sums"], "the new ones took their place"


def test_no_model_at_all_is_an_error_that_says_what_to_make(run, capsys):
    assert run() == 2
    assert "make pretrain ARGS='--name t'" in capsys.readouterr().err


def test_a_required_benchmark_that_cannot_be_read_is_an_error(run, stub, scripted, capsys):
    scripted(lambda question, sample: RIGHT)
    stub("runs/t/pretrain/model")
    assert run("--benchmarks", "aime24") == 2
    assert "aime24.jsonl" in capsys.readouterr().err
    assert run("--extra-benchmarks", "sums=heldout") == 2
    assert "two benchmarks are called 'sums'" in capsys.readouterr().err


def test_extra_benchmarks_are_scored_where_their_data_is(run, stub, scripted, tmp_path):
    scripted(lambda question, sample: RIGHT)
    stub("runs/t/pretrain/model", template="r1-zero-short")
    lines = [json.dumps({"id": i, "problem": "1+1?", "answer": "2"}) for i in range(5)]
    (tmp_path / "math500.jsonl").write_text("\n".join(lines))
    assert run("--extra-limit", "3") == 0
    assert state(tmp_path)["scores"]["base"]["math500"]["n"] == 3 and not state(tmp_path)["not_scored"]


def test_a_small_benchmark_has_more_samples_a_problem(run, stub, scripted, tmp_path):
    """As in the paper: k of 4 to 64, by the size of the set."""
    scripted(lambda question, sample: RIGHT)
    stub("runs/t/pretrain/model", template="r1-zero-short")
    (tmp_path / "math500.jsonl").write_text(json.dumps({"id": "a", "problem": "1+1?", "answer": "2"}))
    assert run("--temperature", "0.6") == 0
    ks = {name: s["k"] for name, s in state(tmp_path)["scores"]["base"].items()}
    assert ks == {"sums": 64, "math500": 4}
    assert run("--samples", "3", "--temperature", "0.6") == 0
    assert {s["k"] for s in state(tmp_path)["scores"]["base"].values()} == {3}
    assert run() == 0
    assert {s["k"] for s in state(tmp_path)["scores"]["base"].values()} == {1}, "greedy"


def test_a_model_of_the_hub_is_scored_and_known_by_its_revision(
    run, stub, scripted, tmp_path, monkeypatch, capsys
):
    scripted(lambda question, sample: RIGHT)
    path = stub("abc123", template="r1-zero-short")
    monkeypatch.setattr("pipeline.run.directory.hub_model", lambda name, revision=None: path)
    assert run("--models", "base=Qwen/Qwen2.5-1.5B") == 0
    got = state(tmp_path)
    assert got["models"]["base"] == {"from": "Qwen/Qwen2.5-1.5B", "path": str(path), "sha256": "abc123"}
    assert got["scores"]["base"]["sums"]["inputs"]["model_sha256"] == "abc123"
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.data.hub.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run("--models", "base=me/nowhere") == 2
    assert "the hub model me/nowhere cannot be read" in capsys.readouterr().err


def test_settings_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="must read LABEL="):
        EvalSettings(models=("pretrain",))
    with pytest.raises(ValueError, match="at least one entry"):
        EvalSettings(benchmarks=())
    with pytest.raises(ValueError, match="heldout_count=0"):
        EvalSettings(heldout_count=0)
