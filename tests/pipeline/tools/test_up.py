"""`up`: the stage graph, which settings go where, failures, signals. Stages are stand-ins."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.arguments import load
from pipeline.table import STAGES
from pipeline.tools.up import needs, stages_of

ROOT = Path(__file__).parents[3]
REAL_PYTHON = sys.executable
TABLE = {stage.name: stage for stage in STAGES}
TINY = [stage.name for stage in STAGES if stage.preset == "tiny"]
OF_STUDENTS = {"on_policy", "student_rl", "distill_rl", "students"}
CHAIN = [name for name in TINY if name not in OF_STUDENTS]  # what r1 makes
SMOLLM2 = ["smollm2", "distill", "eval", "report"]
PRESETS = {"tiny": TINY, "smollm2": SMOLLM2, "half": ["sft", "grpo", "eval"]}
PYTHON = """#!/bin/sh
# Stands for Python: notes the call, then does what a stage does to its directory.
echo "$*" >> calls
shift 2; stage=$1; name=; runs=runs; seed=0; resume=
while [ $# -gt 0 ]; do
    case $1 in
        --name) name=$2; shift ;; --runs) runs=$2; shift ;; --seed) seed=$2; shift ;; --resume) resume=1 ;;
    esac
    shift
done
dir=$runs/$name/$stage
if [ -z "$resume" ] && [ -e $dir/done.json ]; then
    case $stage in eval|report) ;; *) echo "error: in use" >&2; exit 2 ;; esac
fi
case " $SLOW " in *" $stage "*)
    trap 'echo "$stage saved" >> calls; exit 130' USR1
    trap 'echo "$stage has Ctrl-C" >> calls' INT
esac
mkdir -p $dir
echo "seed = $seed" > $dir/config.toml
echo "$stage begins"
case " $SLOW " in *" $stage "*) for i in 1 2 3 4 5 6 7 8 9 10 $MORE; do sleep 0.1; done ;; esac
case "$FAIL" in "$stage "[0-9]*) exit ${FAIL#* } ;; "$stage killed") kill -9 $$ ;; esac
echo "$stage ends" >> ends
touch $dir/done.json
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory: three presets, and a stand-in for the Python that runs the stages."""
    monkeypatch.chdir(tmp_path)
    python = Path("python")
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / python))
    for preset, stages in PRESETS.items():
        Path("configs", preset).mkdir(parents=True)
        for stage in stages:
            source = ROOT / "configs" / ("smollm2" if preset == "smollm2" else "tiny") / f"{stage}.toml"
            shutil.copy(source, Path("configs", preset))
    return tmp_path


@pytest.fixture
def up(here, capfd, monkeypatch):
    """`up LINE`: (exit code, stage calls, all output)."""

    def run(line: str, fail: str = "", slow: str = "") -> tuple[int, list[str], str]:
        monkeypatch.setenv("FAIL", fail)
        monkeypatch.setenv("SLOW", slow)
        for file in ("calls", "ends"):
            Path(file).write_text("")
        code = main(["up", *shlex.split(line)])
        return code, calls(), "".join(capfd.readouterr())

    return run


def calls() -> list[str]:
    return [line.removeprefix("-m pipeline ") for line in Path("calls").read_text().splitlines()]


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


# ---- the graph


@pytest.mark.parametrize("stage", TINY)
def test_a_stage_comes_after_what_the_table_says(up, stage):
    code, calls, out = up(stage)
    assert code == 0, out
    got = names(calls)
    assert sorted(got) == sorted(needed(stage, TINY)) and got[-1] == stage
    for i, name in enumerate(got):
        assert {before for before in TABLE[name].after if before in TINY} <= set(got[:i])
    for call in calls[:-1]:
        assert call.endswith("--name tiny --runs runs --resume")
        assert f"{stage} needs {call.split()[0]}: making it first" in out
    assert calls[-1] == f"{stage} --config configs/tiny/{stage}.toml --name tiny --runs runs"


@pytest.mark.parametrize("preset", sorted(file.name for file in (ROOT / "configs").iterdir()))
def test_the_graph_has_what_the_configs_name(monkeypatch, preset):
    monkeypatch.chdir(ROOT)
    here = stages_of(preset)
    for stage in here:
        config = load(stage, Path("configs", preset, f"{stage.name}.toml"), [])
        named = [
            getattr(config, key, "") for key in ("init_from", "corpus", "samples_from", "models", "teacher")
        ]
        named += [config.tokenizer_from] if stage.name == "student" else []
        values = [str(v) for value in named for v in (value if isinstance(value, tuple) else [value])]
        read = {value.rpartition("=")[2].split("/")[0] for value in values} & set(TABLE)
        assert read <= set(stage.after), f"{preset}/{stage.name}.toml reads {read}"
        if stage.name not in ("eval", "report"):
            assert read == {other.name for other in needs(stage, here)}


def test_smollm2_needs_only_the_public_model(up):
    assert names(up("smollm2")[1]) == ["smollm2"]
    assert up("eval --preset smollm2")[1] == [
        "eval --config configs/smollm2/eval.toml --name smollm2 --runs runs"
    ]
    for goal, expected in (
        ("distill", ["smollm2", "distill"]),
        ("report", ["smollm2", "eval", "report"]),
        ("r1", SMOLLM2),
    ):
        code, calls, out = up(f"{goal} --preset smollm2 --name {goal}")
        assert code == 0 and names(calls) == expected, out


def test_a_preset_without_the_early_stages_leaves_them_out(up):
    assert names(up("grpo --preset half")[1]) == ["sft", "grpo"]


def test_age_does_not_count_existence_does(up):
    assert up("grpo")[0] == 0
    for path in Path("runs/tiny").glob("*/done.json"):
        os.utime(path, (1, 1) if path.parent.name == "grpo" else None)
    Path("configs/tiny/sft.toml").touch()
    code, calls, _ = up("reject")
    assert code == 0 and names(calls) == ["reject"]
    Path("runs/tiny/sft/done.json").unlink()
    assert names(up("sft2 --jobs 1")[1]) == ["sft", "sft2"]


def test_a_goal_is_run_even_when_it_is_done(up):
    assert up("eval")[0] == 0
    code, calls, out = up("eval")
    assert code == 0 and names(calls) == ["eval"], out
    code, calls, out = up("sft")
    assert code == 2 and names(calls) == ["sft"] and out.count("error: in use") == 1
    assert up("sft --resume")[1] == ["sft --config configs/tiny/sft.toml --name tiny --runs runs --resume"]


@pytest.mark.parametrize("goal", ["r1", "all"])
def test_r1_goes_on_where_it_stopped_and_reports_when_it_is_done(up, goal):
    code, calls, out = up(f"{goal} --name x --seed 0 --jobs 1", fail="grpo 3")
    assert code == 3 and names(calls) == ["pretrain", "zero", "sft", "grpo"]
    assert all(call.endswith("--name x --runs runs --seed 0 --resume") for call in calls)
    assert f"{goal}: grpo\n" in out
    assert f"go on with: python -m pipeline up {goal} --name x --seed 0 --jobs 1 --resume" in out
    assert "grpo ended with exit code 3; " in out
    code, calls, out = up(f"{goal} --name x --seed 0 --jobs 1 --resume")
    assert code == 0 and names(calls) == CHAIN[CHAIN.index("grpo") :], out
    assert f"{goal}: runs/x is finished" in out
    code, calls, out = up(f"{goal} --name=x --resume")
    assert code == 0 and not calls and f"{goal}: runs/x was finished already" in out


def test_several_goals_are_run_once_each_in_order(up):
    code, calls, out = up("zero pretrain sft")
    assert code == 0, out
    assert names(calls) == ["pretrain", "zero", "sft"] and "--resume" not in " ".join(calls)


# ---- settings


@pytest.mark.parametrize(
    ("name", "flags"),
    [("a", "--name a --optim.lr 1e-3  --seed  7"), ("b", "--seed=7 --optim.lr 1e-3 --name=c --name=b")],
)
def test_settings_go_to_the_goal_but_name_and_seed_to_all(up, name, flags):
    code, calls, out = up(f"zero {flags}")
    assert code == 0, out
    assert calls == [
        f"pretrain --config configs/tiny/pretrain.toml --name {name} --runs runs --seed 7 --resume",
        f"zero --config configs/tiny/zero.toml --name {name} --runs runs --seed 7 --optim.lr 1e-3",
    ]


def test_runs_elsewhere_and_quotes(up):
    code, calls, out = up("""zero --runs there --story "two  words; $HOME '" """)
    assert code == 0, out
    assert calls[0].endswith("--name tiny --runs there --resume")
    assert calls[1].endswith("--runs there --story two  words; $HOME '")
    assert Path("there/tiny/zero/done.json").exists() and not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "reports"),
    [
        ("sft --preset tinny", "no preset 'tinny'; there are: half smollm2 tiny"),
        ("r1 --preset tinny", "no preset 'tinny'"),
        ("sft --preset smollm2", "preset smollm2 has no stage sft; it has: smollm2 distill eval report"),
        ("r1 --group-size 4", "r1 takes --name, --seed, --runs and --jobs, not --group-size 4"),
        ("sft --name a/b", "name='a/b'"),
        ("sft --name ..", "name='..'"),
        ("sft --name", "--name needs a value"),
        ("sft --preset micro tiny", "unexpected argument 'tiny'"),
        ("sft --name --seed 1", "--name needs a value"),
        ("sft --seed=", "--seed cannot be ''"),
        ("sft --jobs -1", "jobs=-1 must be at least 0"),
        ("sft --jobs many", "--jobs cannot be 'many'"),
        ("", "up needs a STAGE"),
        ("--preset tiny", "up needs a STAGE"),
        ("grpoo", "unknown stage 'grpoo'; did you mean grpo"),
        ("sft --stepps 3", "unknown setting --stepps"),
        ("sft --seed x", "--seed cannot be 'x'"),
    ],
)
def test_wrong_input_is_one_clear_line_before_anything_is_made(up, line, reports):
    code, calls, out = up(line)
    assert code == 2 and not calls and reports in out
    assert len(out.strip().splitlines()) == 1 and out.startswith("error: "), out


def test_a_folder_without_presets_is_named(up, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "there are: none in configs/ of this folder" in up("sft")[2]


def test_a_run_begun_with_another_seed_is_not_mixed(up):
    assert up("pretrain")[0] == 0
    code, calls, out = up("zero --seed 1")
    assert (
        code == 2
        and not calls
        and "runs/tiny/pretrain/config.toml has seed 0, not 1; take another --name" in out
    )
    assert up("zero --seed 0")[0] == 0


# ---- side by side, failures, signals


def test_jobs_runs_what_depends_on_nothing_unfinished_side_by_side(up):
    """distill takes a second; sft2 and grpo2 end meanwhile; eval, which reads all three, comes last."""
    code, _, out = up("r1 --jobs 2", slow="distill")
    assert code == 0, out
    ends = names(Path("ends").read_text().splitlines())
    beside = ends.index("student")
    assert ends.pop(beside) == "student" and 0 < beside < ends.index("sft2"), "beside the RL stages"
    assert ends == ["pretrain", "zero", "sft", "grpo", "reject", "sft2", "grpo2", "distill", "eval", "report"]
    assert all(f"{stage:8} | {stage} begins\n" in out for stage in CHAIN), out
    up("r1 --name one --jobs 1", slow="distill")
    assert names(Path("ends").read_text().splitlines()) == CHAIN


@pytest.mark.parametrize(
    "line",
    ["r1 2 yes", "distill 8 yes", "r1 1 no", "reject 2 no", "distill --threads 2 2 no", "r1 --jobs 1 2 no"],
)
def test_two_stages_of_one_thread_run_side_by_side_where_there_are_two_cores(up, monkeypatch, line):
    line, cores, beside = line.rsplit(maxsplit=2)  # those of `reject` need each other
    monkeypatch.setattr("os.cpu_count", lambda: int(cores))
    code, _, out = up(line)
    assert code == 0 and ("\npretrain begins\n" in "\n" + out) is (beside == "no"), "its line has no name"
    ends = names(Path("ends").read_text().splitlines())
    assert (ends == [name for name in CHAIN if name in ends]) is (beside == "no"), ends


def test_eval_waits_for_a_student_that_is_made_in_the_same_call(up):
    code, _, out = up("r1 --preset smollm2 --jobs 4", slow="distill")
    assert code == 0 and names(Path("ends").read_text().splitlines()) == SMOLLM2, out


@pytest.mark.parametrize("code", [1, 3, 77])
def test_a_failure_lets_the_running_stages_finish_and_starts_none(up, code):
    """sft2 fails at once; distill, beside it, ends; grpo2 and eval are not started."""
    got, calls, out = up("r1 --jobs 2", fail=f"sft2 {code}", slow="distill")
    assert got == code, out
    assert set(names(calls)[-2:]) == {"sft2", "distill"}
    assert Path("runs/tiny/distill/done.json").exists() and not Path("runs/tiny/grpo2").exists()
    assert f"sft2 ended with exit code {code}; go on with: " in out and "up r1 --jobs 2 --resume" in out


def test_after_a_stage_that_refused_its_input_no_second_line_follows(up):
    code, _, out = up("zero", fail="pretrain 2")
    assert code == 2 and out.endswith("pretrain begins\n")


@pytest.mark.parametrize("flags", ["--device cuda", "--loss gpro", "--loss os:nothing"])
def test_what_the_named_stage_refuses_is_refused_before_another_is_made(up, flags):
    code, made, out = up(f"zero {flags}")
    assert code == 2 and not made and out.count("\n") == 1 and flags.split()[1].partition(":")[0] in out


def test_a_stage_that_a_signal_killed_is_a_failure(up):
    code, calls, out = up("zero", fail="pretrain killed")
    assert code == 128 + signal.SIGKILL and names(calls) == ["pretrain"]
    assert "pretrain ended with exit code 137; go on with: " in out


UP = (
    "import sys; sys.executable = './python'; from pipeline.__main__ import main; "
    "sys.exit(main(['up', *sys.argv[1:]]))"
)


def started(*line: str, slow: str, more: str = "") -> subprocess.Popen[str]:
    """`up LINE` in a process group of its own, as a terminal has it, once its slow stages run."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW": slow, "MORE": more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([REAL_PYTHON, "-c", UP, *line], env=env, start_new_session=True, **pipes)
    deadline = time.monotonic() + 60
    while not all(Path("runs/tiny", stage, "config.toml").exists() for stage in slow.split()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("to_group", [True, False])
def test_ctrl_c_lets_the_running_stage_save_and_exits_130(here, to_group):
    process = started("zero", slow="pretrain", more="1 2 3 4 5 6 7 8 9 10 " * 5)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130, out
    assert calls()[1:] == (["pretrain has Ctrl-C"] if to_group else []) + ["pretrain saved"]
    assert "interrupted; go on with: python -m pipeline up zero --resume" in out
    assert not Path("runs/tiny/zero").exists()


def test_ctrl_c_with_two_stages_waits_for_both(here):
    for stage in ("pretrain", "zero", "sft", "grpo", "reject", "student"):
        Path("runs/tiny", stage).mkdir(parents=True)
        Path("runs/tiny", stage, "done.json").touch()
    process = started("r1", "--jobs", "2", slow="sft2 distill", more="1 2 3 4 5 6 7 8 9 10 " * 5)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130, out
    assert {"sft2 saved", "distill saved"} <= set(calls()) and not Path("runs/tiny/grpo2").exists()


def test_a_stage_that_ends_in_spite_of_ctrl_c_is_the_last(here):
    """A stage in its last step has nothing to save; what comes after it is not started."""
    Path("python").write_text(PYTHON.replace("""echo "$stage saved" >> calls; exit 130""", "true"))
    process = started("zero", slow="pretrain")
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; go on with" in out, out
    assert Path("runs/tiny/pretrain/done.json").exists() and not Path("runs/tiny/zero").exists()


def test_sigterm_ends_the_running_stage_too(here):
    process = started("zero", slow="pretrain", more="1 2 3 4 5 6 7 8 9 10 " * 5)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and len(calls()) == 1, out
