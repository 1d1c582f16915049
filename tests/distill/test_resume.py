"""Killed at any moment, with evaluations, early stop and the best checkpoint: a resume keeps the bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from datasets import Features, Value
from safetensors.torch import load_file

from distill.corpus import stored
from distill.trainer import StudentTrainer
from pipeline.data.jsonl import read_log
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from rollout.text import tokenizer as text

Distill = Callable[..., Path]
CHECKED: dict[str, Any] = {"steps": 12, "eval_rows": 30, "eval_every": 4}


class Killed(BaseException):
    """Not an error that anything catches."""


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation finds a higher loss than the one before."""

    def step(self: StudentTrainer, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        return torch.tensor(float(self.state.global_step)), None, None

    monkeypatch.setattr(StudentTrainer, "prediction_step", step)


def killing(method: str, call: int, after: bool) -> Callable[[RunDir], None]:
    """A hook: the `call`-th call of a method of the run directory ends the process, before or after it."""

    def hook(run_dir: RunDir) -> None:
        real, calls = run_dir.__getattribute__(method), iter(range(1, 99))

        def ends(*args: Any, **more: Any) -> Any:
            due = next(calls) == call
            if due and not after:
                raise Killed
            result = real(*args, **more)
            if due:
                raise Killed
            return result

        run_dir.__setattr__(method, ends)

    return hook


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Weights of both models; metrics less times."""
    weights = {
        f"{label}/{name}": tensor
        for label in ("student", "plain")
        for name, tensor in load_file(folder / label / "model/model.safetensors").items()
    }
    rows = read_log(folder / "metrics.jsonl")
    return weights, [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


MOMENTS = [("log", 6, True), ("log", 10, True), ("checkpoint", 2, False), ("checkpoint", 2, True)]
MOMENTS += [("save_model", 1, False), ("save_model", 1, True), ("checkpoint", 3, True)]


@pytest.mark.parametrize("patience", [0, 1], ids=["to the end", "early"])
def test_a_kill_changes_no_bit(distill: Distill, rising: None, patience: int) -> None:
    """Where it stops early, at update 8, the model is that of update 4 and no update follows a resume."""
    whole = distill(name="whole", patience=patience, **CHECKED)
    weights, metrics = results(whole)
    taught = [row["step"] for row in metrics if "loss/lm" in row]
    steps = 8 if patience else 12
    assert taught == [*range(1, steps + 1), *range(13, 13 + steps)]
    best = load_file(whole / "student/checkpoint-4/model.safetensors")
    assert all(torch.equal(best[name], weights[f"student/{name}"]) for name in best)
    told = [row["data/tokens"] for row in metrics if row["step"] == steps and "data/tokens" in row]
    about = json.loads((whole / "student/model/pipeline.json").read_text())
    assert about["tokens"] == {"trained": told[0]}, "those of the updates that were made"
    card = (whole / "student/model/README.md").read_text()
    assert f"{steps} updates" in card and "those of update 4, of the lowest held-out loss" in card
    for number, moment in enumerate(MOMENTS):
        cut = f"cut{number}"
        with pytest.raises(Killed):
            distill(name=cut, patience=patience, hook=killing(*moment), **CHECKED)
        found, told = results(distill(name=cut, patience=patience, resume=True, **CHECKED))
        assert told == metrics, moment
        assert all(torch.equal(found[name], weights[name]) for name in weights), moment


def test_a_best_checkpoint_that_is_gone_is_named(distill: Distill, rising: None, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        distill(hook=killing("save_model", 1, False), **CHECKED)
    file = tmp_path / "tiny/distill/student/checkpoint-4/model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="checkpoint-4 is missing or corrupted"):
        distill(resume=True, **CHECKED)


def test_a_preparation_that_was_killed_starts_again(
    distill: Distill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, calls = text.encode_example, iter(range(999))

    def encode(*args: Any) -> Any:
        if next(calls) == 250:  # within the control's rows
            raise Killed
        return real(*args)

    whole = results(distill(name="whole", steps=2))
    monkeypatch.setattr("pipeline.data.pool.encode_example", encode)
    with pytest.raises(Killed):
        distill(steps=2)
    rows = tmp_path / "tiny/distill/rows"
    assert {file.name for file in rows.iterdir()} == {"corpus.arrow", "student.arrow", "plain.arrow.partial"}
    found, told = results(distill(steps=2, resume=True))
    assert told == whole[1] and all(torch.equal(found[name], whole[0][name]) for name in found)
    assert next(calls) < 200 + 251 + 200, "the student's rows were not tokenized again"


def test_rows_go_to_disk_as_they_come(distill: Distill) -> None:
    """64 MB of text within 16 MB of memory, to write and to read."""
    at: list[RunDir] = []
    distill(steps=1, plain_control=False, hook=at.append)
    pool, before = pyarrow.default_memory_pool(), pyarrow.total_allocated_bytes()

    def rows() -> Iterator[dict[str, str]]:
        for number in range(8_000):
            assert pool.bytes_allocated() - before < 1 << 24
            yield {"text": f"{number:08d}" * 1_000}

    found = stored(at[0], "long", rows(), Features({"text": Value("large_string")}))
    assert len(found) == 8_000 and found[7_999]["text"].startswith("00007999")
    assert (at[0].path / "rows/long.arrow").stat().st_size > 6e7
    assert pool.bytes_allocated() - before < 1 << 24
    assert "rows/long.arrow" in json.dumps(at[0].environment()["inputs"])
