"""`up` and the environment with vLLM: which stages run in it, and that it is made first."""

# ruff: noqa: F811 - fixtures of the other file

from __future__ import annotations

from pathlib import Path

import pytest
from test_up import CHAIN, PYTHON, here, names, needed, up  # noqa: F401 - fixtures


@pytest.fixture
def makefile(here, monkeypatch):
    """A Makefile whose vLLM environment is a second stand-in for Python, and notes that it was made."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    script = Path("made-python")
    script.write_text(PYTHON.replace('"$*" >> calls', '"vllm: $*" >> calls'))
    recipe = "mkdir -p .venv-vllm/bin; cp made-python .venv-vllm/bin/python; chmod +x .venv-vllm/bin/python"
    Path("Makefile").write_text(f".venv-vllm/stamp:\n\t@echo makes vllm; {recipe}; touch $@\n")


def test_a_stage_that_asks_for_vllm_runs_in_its_environment_which_is_made_first(up, makefile):
    """By a flag, and by the preset's file; stages without vLLM stay in this environment."""
    code, calls, out = up("grpo --rollout.engine vllm")
    assert code == 0 and out.index("makes vllm") < out.index("begins")
    in_vllm = [call for call in calls if call.startswith("vllm: ")]
    assert len(in_vllm) == 1 and in_vllm[0].split()[:4] == ["vllm:", "-m", "pipeline", "grpo"]
    assert names(calls)[:-1] == needed("grpo", CHAIN)[:-1]
    file = Path("configs/half/eval.toml")
    file.write_text('engine = "vllm"\n' + file.read_text())
    code, calls, out = up("eval --preset half")
    assert code == 0 and "makes vllm" not in out  # it is there
    assert [call.split()[:4] for call in calls if "eval" in call] == [["vllm:", "-m", "pipeline", "eval"]]


def test_without_vllms_environment_nothing_is_begun(up, makefile):
    Path("Makefile").write_text(".venv-vllm/stamp:\n\t@echo no index; exit 1\n")
    code, calls, out = up("grpo --rollout.engine vllm")
    assert code == 2 and not calls
    assert "error: the environment with vLLM, .venv-vllm, cannot be set up" in out


def test_where_vllm_is_installed_every_stage_stays(up, makefile, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    code, calls, out = up("grpo --rollout.engine vllm")
    assert code == 0 and "makes vllm" not in out and not any("vllm:" in call for call in calls)
