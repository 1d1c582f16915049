"""The command line: exit codes, and one line on stderr for whatever the user got wrong."""

from __future__ import annotations

import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import __main__ as command_line
from pipeline import table as stages
from pipeline.errors import UserError
from pipeline.settings.common import StageSettings
from pipeline.table import STAGES, Stage


@dataclass(frozen=True, kw_only=True)
class ToySettings(StageSettings):
    """A toy stage."""

    steps: int = 3
    """Steps."""


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A stage `toy`; its `run` can be set. The working directory is `tmp_path`, with toy.toml in it."""
    module = types.ModuleType("toy_stage")
    module.run = lambda config, run_dir: None
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setattr(command_line, "STAGES", (*STAGES, Stage("toy", ToySettings, "toy_stage", "a toy")))
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text("steps = 4\n")
    return module


def main(capsys, line):
    """Exit code, and the lines of stderr, of `python -m pipeline LINE`."""
    code = command_line.main(shlex.split(line))
    return code, capsys.readouterr().err.strip().splitlines()


def test_done_is_0(toy, capsys):
    seen = []
    toy.run = lambda config, run_dir: seen.append((config.steps, run_dir.path))
    assert main(capsys, "toy --config toy.toml --steps 5") == (0, [])
    assert seen == [(5, Path("runs/tiny/toy"))]
    assert Path("runs/tiny/toy/done.json").is_file()


def test_config_with_an_equals_sign(toy, capsys):
    assert main(capsys, "toy --config=toy.toml") == (0, [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("grpoo --config x.toml", ["unknown stage 'grpoo'", "did you mean grpo"]),
        ("xyzzyx", ["unknown stage 'xyzzyx'", "pretrain", "grade"]),
        ("toy", ["needs --config FILE", "toy.toml"]),
        ("toy --config", ["--config needs a file"]),
        ("toy --config no.toml", ["no config no.toml", "toy.toml"]),
        ("toy --config bad.toml", ["bad.toml", "line 1"]),
        ("toy --config toy.toml --stepps 4", ["--stepps", "did you mean --steps"]),
        ("toy --config toy.toml --steps many", ["--steps", "'many'"]),
        ("toy --config toy.toml --name a/b", ["--name", "a/b"]),
        ("toy --config toy.toml --name ..", ["--name", ".."]),
    ],
)
def test_wrong_input_is_2_and_one_line(toy, capsys, line, says):
    Path("bad.toml").write_text("steps ==\n")
    code, err = main(capsys, line)
    assert code == 2 and len(err) == 1 and err[0].startswith("error: "), err
    assert all(part in err[0] for part in says), err


def test_a_stage_that_refuses_its_input_is_2(toy, capsys):
    def run(config, run_dir):
        raise UserError("problems.jsonl, line 3: no answer")

    toy.run = run
    assert main(capsys, "toy --config toy.toml") == (2, ["error: problems.jsonl, line 3: no answer"])
    assert not Path("runs/tiny/toy").exists()  # nothing was done: the corrected command starts afresh


def test_a_used_directory_says_how_to_go_on_and_that_works(toy, capsys):
    def stop(config, run_dir):
        run_dir.checkpoint(1, lambda folder: None)  # a run that did nothing leaves no directory
        raise UserError("stop")

    toy.run = stop
    line = "toy --config toy.toml --seed 7 --name mine"
    assert main(capsys, line)[0] == 2
    code, err = main(capsys, line)
    assert code == 2 and len(err) == 1 and "runs/mine/toy is in use" in err[0]
    again = err[0].split("go on with: ")[1].split(", or take")[0]
    assert "--seed 7" in again and again.endswith("--resume")
    toy.run = lambda config, run_dir: None
    assert main(capsys, again.split("-m pipeline ")[1]) == (0, [])


def test_interrupted_is_130(toy, capsys):
    def run(config, run_dir):
        run_dir.on_sigint(2, None)
        run_dir.stop_if_interrupted()

    toy.run = run
    code, err = main(capsys, "toy --config toy.toml --seed 3")
    assert code == 130 and len(err) == 1
    assert "everything is saved" in err[0] and err[0].endswith("--config toy.toml --seed 3 --resume")


def test_a_defect_is_1_with_its_traceback(toy, capsys):
    toy.run = lambda config, run_dir: 1 / 0
    with pytest.raises(ZeroDivisionError):  # uncaught: Python prints it and exits with 1
        command_line.main(["toy", "--config", "toy.toml"])


def test_no_arguments_and_help(cli):
    bare, asked = cli(), cli("--help")
    assert (bare.returncode, asked.returncode) == (2, 0)
    assert bare.stdout == asked.stdout
    for entry in (*stages.STAGES, *stages.COMMANDS):
        assert f"  {entry.name} " in asked.stdout and entry.summary in asked.stdout


def test_exit_code_of_the_process(cli, tmp_path):
    done = cli("grpo", "--config", "missing.toml", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "missing.toml" in done.stderr
