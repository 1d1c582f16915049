"""How the commands open a model: device, threads, and what is said when that cannot be."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import UserError
from pipeline.tools.open import ModelSettings, open_model, trained_template
from rollout.engine import StaleWeights
from rollout.settings import LocalSettings, VllmSettings


@pytest.fixture
def asked(monkeypatch):
    """What `open_engine` was asked for, and the torch threads at that moment."""
    calls = []

    def open_engine(*args):
        calls.append((*args, torch.get_num_threads()))
        return "engine", None

    monkeypatch.setattr("pipeline.tools.open.open_engine", open_engine)
    yield calls
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("device", "gpu", "want"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_everything_reaches_the_engine(asked, monkeypatch, tmp_path, device, gpu, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    vllm, local = VllmSettings(max_batch=3), LocalSettings(max_batch=4)
    settings = ModelSettings(
        model=tmp_path, engine="vllm", dtype="bfloat16", device=device, threads=2, vllm=vllm, local=local
    )
    assert open_model(settings) == ("engine", None)
    assert asked == [(tmp_path, "vllm", "bfloat16", want, vllm, local, 0, 2, 0, 2)]


def test_zero_threads_are_torchs_own_choice(asked, tmp_path):
    open_model(ModelSettings(model=tmp_path))
    assert asked[0][-1] == 1  # what the tests have


@pytest.mark.parametrize("error", [FileNotFoundError, ModuleNotFoundError, ValueError, StaleWeights])
def test_what_cannot_be_opened_is_named(monkeypatch, tmp_path, error):
    def refuse(*args):
        raise error("for a reason")

    monkeypatch.setattr("pipeline.tools.open.open_engine", refuse)
    with pytest.raises(UserError, match="for a reason") as said:
        open_model(ModelSettings(model=tmp_path))
    assert str(tmp_path) in str(said.value)


def test_threads_below_zero_are_refused(tmp_path):
    with pytest.raises(ValueError, match="threads=-1"):
        ModelSettings(model=tmp_path, threads=-1)


def test_a_model_tells_its_template_or_nothing(tmp_path):
    assert trained_template(tmp_path) is None
    (tmp_path / "pipeline.json").write_text('{"template": "r1"}')
    assert trained_template(tmp_path) == "r1"
