"""env.json: what it holds of a GPU, and inputs that come from the hub."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.run import environment
from pipeline.run.directory import open_run
from pipeline.settings.common import StageSettings
from pipeline.table import Stage

TOY = Stage("toy", StageSettings, "toy_stage", "a toy")


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (
            "NVIDIA H100 80GB HBM3, 580.65.06, 81559\nNVIDIA H100 80GB HBM3, 580.65.06, 81559\n",
            {"name": "NVIDIA H100 80GB HBM3", "count": 2, "memory_gib": 79.6, "driver": "580.65.06"},
        ),
        ("", None),
        ("No devices were found\n", None),
    ],
)
def test_the_gpu_is_what_its_driver_reports(monkeypatch, printed, expected):
    def run(command, **how):
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, printed, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    found = environment.gpu()
    assert found == ({"gpu": expected | {"cuda": "13.0"}} if expected else {})


def test_a_machine_without_the_drivers_tool_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu() == {} and "gpu" not in environment.environment()["machine"]


def test_a_model_of_the_hub_is_recorded_by_its_revision_and_resumed_with_it(tmp_path, monkeypatch):
    asked = []

    def model(name, revision=None):
        asked.append(revision)
        return tmp_path / (revision or "abc123")

    monkeypatch.setattr("pipeline.run.directory.hub_model", model)
    for resume in (False, True):
        with open_run(TOY, StageSettings(runs=tmp_path, resume=resume), "toy") as run:
            assert run.model_input("Qwen/Qwen2.5-1.5B") == tmp_path / "abc123"
            env = json.loads((run.path / "env.json").read_text())
            assert env["inputs"] == {"hub:Qwen/Qwen2.5-1.5B": "abc123"}
        (run.path / "done.json").unlink()
    assert asked == [None, "abc123"]


def test_a_corpus_of_the_hub_stays_its_name_and_a_file_is_recorded(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text("{}\n")
    with open_run(TOY, StageSettings(runs=tmp_path), "toy") as run:
        assert run.corpus_input("hub:me/traces:train") == "hub:me/traces:train"
        assert run.corpus_input(str(file)) == file
        assert [Path(p).name for p in json.loads((run.path / "env.json").read_text())["inputs"]] == [
            "c.jsonl"
        ]
        with pytest.raises(UserError, match="no file nowhere"):
            run.corpus_input("nowhere")
