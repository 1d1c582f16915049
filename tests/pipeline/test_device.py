"""`--device cuda` without a GPU: one line from every stage and command, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pipeline.__main__ import main
from pipeline.run.directory import open_run
from pipeline.settings.common import StageSettings
from pipeline.table import COMMANDS, STAGES, Stage
from pipeline.train.supervised import load_state, save_state
from tests.conftest import ROOT


def has_device(entry) -> bool:
    return "device" in {field.name for field in dataclasses.fields(entry.settings)}


def refused(capsys, *argv: object) -> None:
    assert main([*map(str, argv), "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--device cuda: torch finds no GPU here" in said, said
    assert "set --device cpu, or auto" in said


def test_every_stage_that_computes_has_a_device():
    assert {stage.name for stage in STAGES if not has_device(stage)} == {"smollm2", "report"}
    assert {command.name for command in COMMANDS if has_device(command)} == {
        "generate", "evaluate", "replay", "chat", "serve",
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("stage", [s for s in STAGES if has_device(s)], ids=lambda s: s.name)
def test_a_stage_refuses_a_gpu_that_is_not_there(stage, tmp_path, capsys):
    config = ROOT / f"configs/micro/{stage.name}.toml"
    extra = ["--models", f"m={tmp_path}"] if stage.name == "eval" else []
    refused(capsys, stage.name, "--config", config, "--runs", tmp_path / "runs", *extra)
    assert not (tmp_path / "runs/micro").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "name", [c.name for c in COMMANDS if has_device(c) and c.name != "replay"]
)  # which needs a record
def test_a_command_refuses_a_gpu_that_is_not_there(name, checkpoint, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "1+1?"}) + "\n")
    more = {
        "generate": ["--prompts", prompts, "--out", tmp_path / "out"],
        "evaluate": ["--benchmark", "generator:sum", "--limit", 2, "--out", tmp_path / "out"],
    }.get(name, [])
    refused(capsys, name, "--model", checkpoint, *more)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_read_into_host_memory(tmp_path, monkeypatch):
    """Whatever device it was written on; the tensors that take it over stay where they are."""
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **how: asked.append(how) or load(*args, **how))
    with open_run(Stage("toy", StageSettings, "toy", "a toy"), StageSettings(runs=tmp_path), "toy") as run:
        assert load_state(run) == (0, {})
        save_state(run, 3, {"weights": torch.arange(4)})
        step, state = load_state(run)
    assert step == 3 and state["weights"].tolist() == [0, 1, 2, 3]
    assert asked == [{"map_location": "cpu", "weights_only": True}]
