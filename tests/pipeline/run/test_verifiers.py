"""Stages refuse to run programs that nothing confines, and stop when too many verdicts are errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.errors import Stopped, UserError
from pipeline.run import verifiers
from pipeline.run.verifiers import check_errors, check_sandbox
from rewards.pool import WorkerPool
from rewards.programs import isolate, landlock, seccomp
from rewards.reward import Scorer, error_share
from rollout.types import Graded, Problem, Prompt, Rollout

MATH, CODE = Problem("m", "math", "?", answer="7"), Problem("c", "code", "?", tests=("assert f() == 1",))


def graded(*reasons: str) -> list[Graded]:
    rollout = Rollout(Prompt(CODE, "r1", ()), 0, 0, (), (), "stop")
    return [Graded(rollout, "", verdict="error" if why else "correct", detail=why) for why in reasons]


def test_errors_above_the_share_stop_with_the_most_frequent_reason():
    assert error_share([]) == error_share(graded("", "")) == (0.0, "")
    some = graded("", "died", "time", "died")
    assert error_share(some) == (0.75, "died")
    check_errors(Path("scores"), some, 0.75)
    with pytest.raises(
        Stopped,
        match=r"^evaluate: .*75% of 4 rollouts.*max_error_share=0\.5; most often: died\. .*`grade scores ",
    ):
        check_errors(Path("scores"), some, 0.5)


def test_the_layers_are_said_once_and_only_where_there_is_code(capsys):
    with WorkerPool(1) as pool:
        check_sandbox("zero", pool, [MATH], False)
        assert capsys.readouterr().out == "" and pool.pids() == []
        check_sandbox("zero", pool, [MATH, CODE, CODE], False)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("zero: programs are confined by ") and "rlimits" in line


def test_without_layers_a_stage_refuses_unless_it_is_allowed(capsys, monkeypatch):
    monkeypatch.setattr(verifiers, "sandbox_gap", lambda pool: "this machine has no seccomp")
    with WorkerPool(1) as pool:
        with pytest.raises(UserError, match=r"^zero: .*no seccomp.*--allow-unsafe-code"):
            check_sandbox("zero", pool, [CODE], False)
        check_sandbox("zero", pool, [CODE], True)
    assert "confined by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seccomp_here", "landlock_here", "namespaces_here", "missing"),
    [
        (1, 7, 1, []),
        (1, 7, 0, []),
        (1, 0, 1, []),
        (0, 7, 1, ["seccomp"]),
        (1, 0, 0, ["namespaces", "Landlock"]),
    ],
)
def test_what_counts_as_too_few_layers(monkeypatch, seccomp_here, landlock_here, namespaces_here, missing):
    monkeypatch.setattr(seccomp, "available", lambda: bool(seccomp_here))
    monkeypatch.setattr(landlock, "version", lambda: landlock_here)
    monkeypatch.setattr(isolate, "_no_namespaces", "" if namespaces_here else "refused")
    gap = isolate.gap()
    assert bool(gap) == bool(missing) and all(layer in gap for layer in missing)


def test_a_scorer_runs_no_program_unconfined_unless_it_may(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "rewards.pool.WorkerPool.call", lambda pool, task, limit: asked.append(pool._arguments) or {}
    )
    for unsafe in (False, True):
        with Scorer({"accuracy": 1.0}, allow_unsafe_code=unsafe) as scorer:
            scorer.pool.call({}, 1)
    assert asked == [[], ["unsafe"]]


def test_a_verifier_that_always_fails_stops_an_evaluation_with_exit_code_3(tmp_path, stub, scripted, capsys):
    rows = [{"question": f"q{i}", "tests": ["assert 1 == 1"]} for i in range(3)]
    (tmp_path / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scripted(lambda question, sample: "```python\nx = 1\n```")
    line = ["evaluate", "--model", stub(template="r1"), "--benchmark", tmp_path / "broken.jsonl"]
    line += ["--out", tmp_path / "out", "--max-tokens", "40", "--samples", "1"]
    assert main([*map(str, line)]) == 3
    said = capsys.readouterr().err
    assert "stopped: evaluate: the verifier failed for 100% of 3 rollouts" in said and "never asked" in said
    assert not (tmp_path / "out" / "scores.json").exists()
    assert main(["grade", str(tmp_path / "out"), str(tmp_path / "again")]) == 0, "as the message says"
    assert main([*map(str, line), "--max-error-share", "1"]) == 0
