"""A resume with other settings or inputs, damaged files, rollbacks: refused by name, or recorded."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file
from toy import begun_with_checkpoints, refusal, save

from pipeline.arguments import fields_of
from pipeline.data.jsonl import read_log
from pipeline.errors import Stopped, UserError
from pipeline.run.history import MAY_CHANGE
from pipeline.settings.common import OptimSettings
from pipeline.table import STAGES
from rollout.types import Problem


def test_resume_takes_the_same_settings_but_for_those_that_may_change(opened):
    begun_with_checkpoints(opened, 2)
    beta = OptimSettings(beta1=0.5)
    assert "begun with optim.beta1 = 0.9, not 0.5" in refusal(opened(resume=True, optim=beta))
    assert "begun with seed = 0, not 1" in refusal(opened(resume=True, seed=1))
    assert "has done 2 steps; --steps 1 must be at least that" in refusal(opened(resume=True, steps=1))


def test_a_run_of_code_with_other_settings_is_sent_to_that_code(opened):
    config = begun_with_checkpoints(opened, 2).path / "config.toml"
    for text in (f"overlap = true\n{config.read_text()}", config.read_text().partition("\n")[2]):
        begun = config.read_text()
        config.write_text(text)
        said = refusal(opened(resume=True))
        assert "if its code had other settings, go on with that (commit in env.json)" in said
        assert said.count("\n") == 0 and ("overlap = True, not None" in said) == ("overlap" in text)
        config.write_text(begun)


def test_what_changes_at_a_resume_is_said_and_recorded(opened, capsys):
    run = begun_with_checkpoints(opened, 2)
    slower = {"steps": 5, "optim": OptimSettings(lr=1e-6)}
    for _ in range(2):  # the second changes nothing
        with pytest.raises(RuntimeError), opened(resume=True, **slower):
            raise RuntimeError
    assert "going on after step 2" in (said := capsys.readouterr().out)
    assert said.count("optim.lr is 1e-06, was 3e-06, steps is 5, was 3") == 1
    history = json.loads((run.path / "env.json").read_text())["history"]
    assert history == [{"step": 2, "changed": {"optim.lr": [3e-6, 1e-6], "steps": [3, 5]}}]
    assert "lr = 1e-06" in (run.path / "config.toml").read_text()
    with opened(resume=True, **slower):
        pass
    assert "is finished, with another optim.lr" in refusal(opened(resume=True, steps=5))
    fewer = refusal(opened(resume=True, **slower | {"steps": 4}))
    assert "is finished, with 5 steps; more of them go on" in fewer
    assert (run.path / "done.json").exists()
    with opened(resume=True, **slower | {"steps": 6}) as more:  # a finished run goes on
        assert more.latest() == (2, run.path / "checkpoint-2") and not (run.path / "done.json").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_resume_that_is_refused_before_its_first_step_leaves_the_run_as_it_was(opened, finished):
    run = begun_with_checkpoints(opened, 2)
    with suppress(RuntimeError), opened(resume=True) as more:
        more.log(3, 3, {"loss/lm": 3.0})
        more.samples(3, [{"text": "a"}])
        if not finished:
            raise RuntimeError
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    assert ("done.json" in before) == finished
    with pytest.raises(UserError), opened(resume=True, steps=9) as more:
        assert [row["step"] for row in read_log(run.path / "metrics.jsonl")] == [2]
        raise UserError("a problem file changed")
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before


def test_every_setting_that_may_change_is_one(opened):
    names = {name for stage in STAGES for name, _ in fields_of(stage.settings)}
    assert names >= MAY_CHANGE


def test_a_run_that_ended_before_its_first_step_is_started_again(opened, capsys):
    with pytest.raises(RuntimeError), opened(seed=1) as run:
        (run.path / "corpus.jsonl").write_text("")
        raise RuntimeError
    with pytest.raises(RuntimeError), opened(seed=2) as run:
        assert not (run.path / "corpus.jsonl").exists()
        run.log(1, 3, {"loss/lm": 2})
        raise RuntimeError
    assert "ended before its first step: starting again" in capsys.readouterr().out
    assert "seed = 2" in (run.path / "config.toml").read_text()
    assert "in use; go on with" in refusal(opened(seed=3))  # a step's record is work
    assert [row["loss/lm"] for row in read_log(run.path / "metrics.jsonl")] == [2]


def test_an_input_that_changed_since_the_run_began_is_refused_by_name(opened, tmp_path):
    given = tmp_path / "data.jsonl"
    given.write_text("{}\n")

    def use(run, question="1+1?"):
        run.file_input(given, "")
        run.record_rows("the problems of data.jsonl", [Problem("a", "math", question)])

    with pytest.raises(RuntimeError), opened() as run:
        use(run)
        save(run, 1)
        raise RuntimeError
    with pytest.raises(RuntimeError), opened(resume=True) as run:
        use(run)
        raise RuntimeError
    changed = "changed since this run began"
    with pytest.raises(UserError, match=f"the problems of .* {changed}"), opened(resume=True) as run:
        use(run, "1+2?")
    given.write_text("{}\n\n")
    with pytest.raises(UserError, match=rf"/data\.jsonl {changed}; restore it"), opened(resume=True) as run:
        use(run)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\x00", '"inputs"', "{}"])
@pytest.mark.parametrize("name", ["env.json", "config.toml", "checkpoint-4/manifest.json", "latest"])
def test_a_damaged_file_of_the_run_is_one_line_that_names_it(opened, name, text):
    run = begun_with_checkpoints(opened, 2, 4)
    (run.path / name).write_text(text)
    said = refusal(opened(resume=True))
    assert str(run.path) in said and ("checkpoint" if name == "latest" else name.partition("/")[0]) in said


def test_a_rollback_goes_to_the_last_checkpoint_from_which_weights_moved_on(opened, capsys):
    with opened() as run:
        for step, applied in ((2, 2), (4, 4), (5, None)):
            run.log(step, 9, {"loss/lm": step})
            run.checkpoint(step, lambda folder: None, applied)
        run.roll_back(8, 4, 0, "too many NaN", 0.5)  # no update came after 4
        assert run.latest() == (2, run.path / "checkpoint-2") and run.rollbacks()[-1]["lr_scale"] == 0.5
        assert [row["step"] for row in read_log(run.path / "metrics.jsonl")] == [2]
        run.roll_back(3, 2, 0, "again", 0.5)
        assert run.latest() is None
        assert "too many NaN: back to step 2, learning rate times 0.5" in capsys.readouterr().out
    history = json.loads((run.path / "env.json").read_text())["history"]
    assert [(e["update"], e["to"], e["lr_scale"]) for e in history] == [(8, 2, 0.5), (3, 0, 0.25)]


def test_checkpoints_of_a_ctrl_c_do_not_push_out_those_for_rollbacks(opened):
    with opened() as run:
        for step, applied in ((2, 2), (4, 4), (5, None), (6, None), (7, None)):
            run.checkpoint(step, lambda folder: None, applied)
        left = {p.name for p in run.path.glob("checkpoint-*")}
        assert left == {f"checkpoint-{n}" for n in (2, 4, 6, 7)}


def test_the_way_out_of_damage_is_the_newest_by_number(opened):
    run = begun_with_checkpoints(opened, 9)
    for name in ("checkpoint-10", "checkpoint-12", "checkpoint-old"):
        (run.path / name).mkdir()
    (run.path / "checkpoint-9/a.bin").write_text("")
    assert "to go on from checkpoint-12: echo" in refusal(opened(resume=True))


def test_a_model_that_is_not_finite_is_not_saved(opened):
    def write(folder):
        save_file(
            {"sound": torch.ones(2), "bad": torch.tensor([1, float("nan")])}, folder / "model.safetensors"
        )

    with pytest.raises(Stopped, match="not finite in bad, so it is not saved"), opened() as run:
        run.save_model(write)
    assert not (run.path / "model").exists()
