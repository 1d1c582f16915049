"""Trackers beside metrics.jsonl: what they get, and that none of them can stop a run."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from accelerate import tracking
from toy import COMMAND

from pipeline.errors import UserError
from pipeline.run.directory import open_run
from pipeline.settings.common import LoggedSettings
from pipeline.table import Stage


@dataclass(frozen=True, kw_only=True)
class LoggedToy(LoggedSettings):
    """A toy stage that logs."""

    steps: int = 3
    """Steps."""


TOY = Stage("toy", LoggedToy, "toy_stage", "a toy")


class Fake(tracking.GeneralTracker):
    """Stands for wandb's tracker; fails where it is told to."""

    name, requires_logging_directory, tracker = "wandb", False, None
    made: list[Fake] = []  # noqa: RUF012
    fails = ""

    def __init__(self, run_name, **kwargs):
        super().__init__()
        self.about, self.calls = (run_name, kwargs), []
        self.made.append(self)

    def call(self, name, *values):
        self.calls.append((name, *values))
        if name == self.fails:
            raise ConnectionError("no network\nat all")

    def start(self):
        self.call("start")

    def store_init_configuration(self, values):
        self.call("settings", values)

    def log(self, values, step=None, **_):
        self.call("log", step, values)

    def finish(self):
        self.call("finish")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    return Fake


def three_steps(tmp_path, **settings):
    """The rows of metrics.jsonl of a run of three steps."""
    with open_run(TOY, LoggedToy(runs=tmp_path, name="r", **settings), COMMAND) as run:
        for step in (1, 2, 3):
            run.log(step, 3, {"loss/lm": step / 2})
    return [json.loads(line) for line in (tmp_path / "r/toy/metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_what_metrics_jsonl_gets(tmp_path, fake):
    rows = three_steps(tmp_path, tracker="wandb")
    (it,) = fake.made
    assert it.about == ("r", {"name": "toy"})
    settings = {"name": "r", "seed": "0", "device": "auto", "threads": "0", "tracker": "wandb", "steps": "3"}
    assert it.calls[:2] == [("start",), ("settings", settings)]
    assert it.calls[2:-1] == [("log", row.pop("step"), row) for row in rows] and it.calls[-1] == ("finish",)
    assert len(rows) == 3


@pytest.mark.parametrize(("fails", "calls"), [("start", 1), ("settings", 2), ("log", 3), ("finish", 6)])
def test_a_tracker_that_dies_is_named_once_and_the_run_goes_on(
    tmp_path, fake, fails, calls, monkeypatch, capsys
):
    monkeypatch.setattr(fake, "fails", fails)
    assert len(three_steps(tmp_path, tracker="wandb")) == 3 and (tmp_path / "r/toy/done.json").exists()
    assert len(fake.made[0].calls) == calls
    assert capsys.readouterr().out.count("tracker wandb failed (ConnectionError: no network): the run") == 1


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="--tracker trackio needs a package: pip install trackio"):
        three_steps(tmp_path, tracker="trackio")
    assert not (tmp_path / "r").exists()


def test_without_a_tracker_nothing_is_loaded(tmp_path, fake):
    assert len(three_steps(tmp_path)) == 3 and not fake.made


def test_a_resumed_run_may_have_another_tracker(tmp_path, fake):
    with (
        pytest.raises(KeyboardInterrupt),
        open_run(TOY, LoggedToy(runs=tmp_path, name="r"), COMMAND) as run,
    ):
        run.log(1, 3, {"loss/lm": 1.0})
        run.checkpoint(1, lambda folder: (folder / "a").write_text("a"))
        raise KeyboardInterrupt
    with open_run(TOY, LoggedToy(runs=tmp_path, name="r", tracker="wandb", resume=True), COMMAND) as run:
        run.log(2, 3, {"loss/lm": 1.0})
        run.roll_back(2, 9, 0, "it diverged", 0.5)
        run.log(2, 3, {"loss/lm": 2.0})
    logged = [call for call in fake.made[0].calls if call[0] == "log"]
    assert [call[1] for call in logged] == [2, 2] and logged[1][2]["loss/lm"] == 2.0


def test_tensorboard_has_every_number(tmp_path):
    pytest.importorskip("tensorboard", reason="no tensorboard here: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = three_steps(tmp_path, tracker="tensorboard")
    found = EventAccumulator(str(tmp_path / "r/toy/tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss/lm")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert "time/elapsed_s" in found.Tags()["scalars"] and len(rows) == 3
