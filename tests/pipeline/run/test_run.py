"""The run directory under a kill, a full disk, corruption, a second process, Ctrl-C: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import COMMAND, ToySettings, begun_with_checkpoints, refusal, save

from pipeline.data.jsonl import read_log
from pipeline.errors import UserError
from pipeline.run import checkpoint as checkpoint_module
from pipeline.run import environment as environment_module
from pipeline.run.checkpoint import KEEP_CHECKPOINTS
from pipeline.run.directory import RunDir
from pipeline.run.environment import environment
from pipeline.run.files import sha256
from pipeline.run.metrics import GLOSSARY, SHORT, duration
from pipeline.settings.common import OptimSettings
from pipeline.table import Stage


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def kill(*args, **kwargs):
    raise Killed


# ---- what a finished run leaves


def test_a_run_leaves_its_story(opened, tmp_path):
    given = tmp_path / "data.jsonl"
    given.write_text("{}\n")
    with opened(seed=5, optim=OptimSettings(lr=0.5)) as run:
        assert not (run.path / "done.json").exists()
        run.file_input(given, "")
        run.log(1, 3, {"loss/lm": 2.0})
        run.samples(1, [{"text": "你好"}])
        run.save_model(lambda folder: (folder / "config.json").write_text("{}"))
    toml = (run.path / "config.toml").read_text()
    assert "seed = 5" in toml and "lr = 0.5" in toml and "resume" not in toml
    env = json.loads((run.path / "env.json").read_text())
    assert env["packages"]["torch"]
    assert env["inputs"] == {str(given): sha256(given)}
    done = json.loads((run.path / "done.json").read_text())
    assert done["seed"] == 5 and done["peak_rss_bytes"] > 1 << 20 and done["seconds"] >= 0
    assert read_log(run.path / "metrics.jsonl")[0]["loss/lm"] == 2.0
    assert read_log(run.path / "samples.jsonl") == [{"step": 1, "text": "你好"}]
    assert not list(run.path.glob("*.partial")) and not list(run.path.glob("*.tmp"))


def test_a_refused_run_leaves_nothing(opened, tmp_path):
    for stage in ("", "sft"):
        (tmp_path / "a" / stage).mkdir(parents=True)
        with pytest.raises(UserError), opened(name="a") as run:
            run.model_input("nowhere")
        assert [path.name for path in tmp_path.glob("**/*")] == (["a", stage] if stage else [])


def test_inputs_that_are_not_there(opened, tmp_path):
    with opened() as run:
        with pytest.raises(UserError, match=r"no model at .*sft.*make it first: make sft"):
            run.model_input("sft")
        with pytest.raises(UserError, match="no model at nowhere"):
            run.model_input("nowhere")
        with pytest.raises(UserError, match=r"make it first: make reject"):
            run.file_input("reject", "corpus.jsonl")
        made = tmp_path / "tiny" / "sft" / "model"
        made.mkdir(parents=True)
        (made / "config.json").write_text("{}")
        assert run.model_input("sft") == made


# ---- a directory in use


def test_a_used_directory_is_never_overwritten(opened):
    with pytest.raises(RuntimeError), opened() as run:
        save(run, 1)
        raise RuntimeError("a defect in the middle")
    assert f"in use; go on with: {COMMAND} --resume, or take another --name" in refusal(opened())
    with opened(resume=True):
        pass
    text = refusal(opened())
    assert "is finished" in text and "rm -r" in text
    with opened(resume=True) as run:
        assert run is None


def test_a_stage_that_extends_may_be_reopened_with_other_settings(opened, tmp_path):
    stage = Stage("table", ToySettings, "toy_stage", "a table", extends=True)
    for seed in (0, 1):
        with opened(stage, seed=seed) as run:
            assert run is not None
            run.metrics.elapsed_before += 10
    assert json.loads((tmp_path / "tiny/table/done.json").read_text())["seconds"] >= 20


def test_a_second_process_is_kept_out(opened, tmp_path):
    with opened() as run:
        code = (
            "from pathlib import Path\n"
            "from pipeline.settings.common import StageSettings\n"
            "from pipeline.run.directory import locked\n"
            f"with locked(Path({str(run.path)!r})): print('got in')\n"
        )
        other = [sys.executable, "-c", code]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        during = subprocess.run(other, env=env, capture_output=True, text=True, check=False)
    after = subprocess.run(other, env=env, capture_output=True, text=True, check=False)
    assert "another process is working in" in during.stderr and "got in" not in during.stdout
    assert after.stdout == "got in\n", after.stderr


# ---- checkpoints


def test_the_newest_checkpoints_are_kept(opened):
    with opened() as run:
        for step in (2, 4, 10):
            save(run, step)
        assert {p.name for p in run.path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-10"}
        assert KEEP_CHECKPOINTS == 2 and run.latest() == (10, run.path / "checkpoint-10")


def test_the_same_step_saved_twice_stays_complete(opened, monkeypatch):
    with opened() as run:
        save(run, 2)
        monkeypatch.setattr("shutil.rmtree", kill)
        save(run, 2)  # a Ctrl-C right after a checkpoint
        assert run.latest() == (2, run.path / "checkpoint-2")


@pytest.mark.parametrize("at", ["write", "manifest", "rename", "pointer"])
def test_a_checkpoint_counts_only_when_it_is_complete(opened, monkeypatch, at):
    def killed_at_pointer(path, text, real=checkpoint_module.write_atomic):
        kill() if path.name == "latest" else real(path, text)

    def killed_at_rename(path, target, real=Path.replace):
        kill() if target.name == "checkpoint-4" else real(path, target)

    with pytest.raises(Killed), opened() as run:
        save(run, 2)
        if at == "write":
            run.checkpoint(4, kill)
        if at == "manifest":
            monkeypatch.setattr(checkpoint_module, "write_atomic", kill)
        if at == "rename":
            monkeypatch.setattr(Path, "replace", killed_at_rename)
        if at == "pointer":
            monkeypatch.setattr(checkpoint_module, "write_atomic", killed_at_pointer)
        save(run, 4)
    monkeypatch.undo()
    with opened(resume=True) as run:
        assert run.latest() == (2, run.path / "checkpoint-2")
        save(run, 4)
        assert run.latest() == (4, run.path / "checkpoint-4")
        assert not list(run.path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "folder"])
def test_corruption_is_found_and_the_way_out_works(opened, damage):
    run = begun_with_checkpoints(opened, 2, 4)
    folder = run.path / "checkpoint-4"
    if damage == "flip":
        (folder / "a.bin").write_text("state a 5")
    if damage == "truncate":
        (folder / "b.bin").write_text("state")
    if damage == "remove":
        (folder / "b.bin").unlink()
    if damage == "manifest":
        (folder / "manifest.json").write_text('{"step": 4')
    if damage == "folder":
        folder.rename(run.path / "elsewhere")
    text = refusal(opened(resume=True))
    assert "checkpoint-4" in text and "to go on from checkpoint-2: echo checkpoint-2 > " in text
    subprocess.run(text.split("checkpoint-2: ")[1].split(", then")[0], shell=True, check=True)
    with opened(resume=True) as again:
        assert again.latest() == (2, run.path / "checkpoint-2")
        assert [row["step"] for row in read_log(run.path / "metrics.jsonl")] == [2]
        save(again, 3)
        assert again.latest() == (3, run.path / "checkpoint-3")
        left = {p.name for p in run.path.glob("checkpoint-*")}
        assert left == {"checkpoint-2", "checkpoint-3"}  # the damaged 4 does not count as the newest


def test_corruption_of_the_only_checkpoint(opened):
    run = begun_with_checkpoints(opened, 2)
    (run.path / "checkpoint-2" / "a.bin").write_text("")
    text = refusal(opened(resume=True))
    assert f"a.bin does not match its manifest (corrupted); no older one is left: rm -r {run.path}" in text


def test_a_model_appears_complete_or_not_at_all(opened):
    def half(folder):
        (folder / "config.json").write_text("{}")
        raise Killed

    with pytest.raises(Killed), opened() as run:
        run.save_model(half)
    assert not (run.path / "model").exists()


# ---- logs


def test_resume_drops_what_will_be_made_again(opened):
    with pytest.raises(RuntimeError), opened() as run:
        for step in range(1, 6):
            run.log(step, 9, {"loss/lm": step})
            run.samples(step, [{"text": f"一\u2028{step}"}, {"text": "b"}])
            if step == 3:
                save(run, step)
        raise RuntimeError
    for name in ("metrics.jsonl", "samples.jsonl"):
        complete = (run.path / name).read_bytes()
        (run.path / name).write_bytes(
            complete + '{"step": 6, "text": "一'.encode()[:-1]
        )  # torn within a character
    with opened(resume=True) as again:
        again.log(4, 9, {"loss/lm": 40})
        again.samples(4, [{"text": "again"}])
    rows = read_log(run.path / "metrics.jsonl")
    assert [(row["step"], row["loss/lm"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    elapsed = [row["time/elapsed_s"] for row in rows]
    assert elapsed == sorted(elapsed)
    samples = read_log(run.path / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 1, 2, 2, 3, 3, 4] and samples[0]["text"] == "一\u20281"


def test_without_a_checkpoint_resume_starts_over(opened):
    with pytest.raises(RuntimeError), opened() as run:
        run.log(1, 3, {"loss/lm": 1})
        raise RuntimeError
    with opened(resume=True) as again:
        assert again.latest() is None
        again.log(1, 3, {"loss/lm": 7})
    assert [row["loss/lm"] for row in read_log(run.path / "metrics.jsonl")] == [7]


def test_each_line_stands_at_once_and_every_key_is_explained(opened, capsys):
    with opened() as run:
        run.log(1, 3, {"loss/lm": 0.5, "optim/lr": 1e-9})
        assert read_log(run.path / "metrics.jsonl")[0]["optim/lr"] == 1e-9
        with pytest.raises(KeyError, match="loss/new"):
            run.log(2, 3, {"loss/new": 1.0})
    out = capsys.readouterr().out
    assert "toy" in out and "1/3" in out and "loss 0.5" in out and "left" in out
    assert set(SHORT) <= set(GLOSSARY)


def test_duration():
    assert [duration(s) for s in (-1, 59.4, 75, 3600 * 2 + 61)] == ["0s", "59s", "1m15s", "2h01m"]


# ---- a full disk, Ctrl-C


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(opened, code):
    def full(folder):
        raise OSError(code, os.strerror(code))

    with (
        pytest.raises(UserError, match=r"disk is full .*free some space, then: .* --resume"),
        opened() as run,
    ):
        run.checkpoint(1, full)
    with opened(resume=True):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_under_the_metrics(opened):
    with pytest.raises(UserError, match="disk is full"), opened() as run:
        run.metrics.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        run.log(1, 3, {"loss/lm": 1.0})


def test_other_system_errors_are_defects(opened):
    with pytest.raises(PermissionError), opened():
        raise PermissionError(errno.EACCES, "no")


def test_ctrl_c_saves_then_says_how_to_go_on(opened):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stop, opened() as run:
        run.stop_if_interrupted()  # nothing happened yet
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # between two steps; the handler has only taken note
        run.stop_if_interrupted(lambda: save(run, 1))
        pytest.fail("went on")
    assert str(stop.value) == f"everything is saved; go on with: {COMMAND} --resume"
    assert signal.getsignal(signal.SIGINT) is handler
    with opened(resume=True) as again:
        assert again.latest() == (1, run.path / "checkpoint-1")


def test_sigusr1_saves_too_and_does_not_add_up(opened):
    """A batch system's notice, and what `up` sends beside a terminal's Ctrl-C."""
    handler = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt, match="everything is saved"), opened() as run:
        for signum in (signal.SIGUSR1, signal.SIGUSR1):
            os.kill(os.getpid(), signum)
        run.stop_if_interrupted(lambda: save(run, 1))
        pytest.fail("went on")
    assert signal.getsignal(signal.SIGUSR1) is handler
    with pytest.raises(KeyboardInterrupt, match="everything is saved"), opened(resume=True) as run:
        for signum in (signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), signum)
        run.stop_if_interrupted()


def test_a_second_ctrl_c_stops_at_once(opened):
    with pytest.raises(KeyboardInterrupt, match="stopped at once"), opened() as run:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    assert not (run.path / "done.json").exists() and isinstance(run, RunDir)


def test_code_that_differs_from_its_commit_is_marked_and_results_are_not_code(tmp_path, monkeypatch):
    monkeypatch.setattr(environment_module, "__file__", str(tmp_path / "pipeline/run/environment.py"))
    results = tmp_path / "docs/results"
    results.mkdir(parents=True)
    (tmp_path / "code.py").write_text("1\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    assert environment()["commit"] and not environment()["modified"]
    (results / "bench-x.json").write_text("{}")
    assert not environment()["modified"]
    (tmp_path / "code.py").write_text("2\n")
    assert environment()["modified"]
