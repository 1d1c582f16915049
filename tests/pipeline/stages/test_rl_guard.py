"""RL through the command line: what diverges or cannot teach is named at once, and stops with exit code 3."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pipeline.__main__ import main
from pipeline.data.jsonl import write_jsonl
from pipeline.stages import grpo
from pipeline.train.learner import Learner
from tests.small import random_policy


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


@pytest.fixture
def zero(policy, tmp_path, capsys):
    """`zero(*flags)`: exit code, stdout, stderr of six steps of RL, a checkpoint after each second."""

    def go(*flags):
        line = ["zero", "--config", "configs/micro/zero.toml", "--runs", str(tmp_path), "--threads", "1"]
        line += ["--init-from", str(policy), "--steps", "6", "--eval-every", "0", "--max-tokens", "12"]
        line += ["--prompts-per-step", "4", "--optim.lr", "1e-3"]
        code = main([*line, *flags])
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def graded_as(monkeypatch):
    """`graded_as(**changes)`: so is every rollout from the third step on."""

    def install(**changes):
        real, calls = grpo.Trainer.grade, []

        def grade(self, rollouts):
            calls.append(1)
            graded = real(self, rollouts)
            return [dataclasses.replace(g, **changes) for g in graded] if len(calls) > 2 else graded

        monkeypatch.setattr(grpo.Trainer, "grade", grade)

    return install


def test_a_verifier_that_always_fails_is_named_and_stops_the_run(zero, graded_as, tmp_path):
    graded_as(verdict="error", detail="the sandbox is gone")
    code, out, err = zero()
    assert code == 3 and err.count("\n") == 1 and "of 2 steps in a row (max_error_share)" in err
    assert "step 3: the verifier failed on 100% of 16 rollouts; most often: the sandbox is gone" in out
    assert "step 5" not in out and "checkpoint-2 is kept; then: " in err and " --resume" in err
    assert (tmp_path / "micro/zero/latest").read_text() == "checkpoint-2\n"


def test_groups_without_spread_are_named_and_stop_the_run(zero, graded_as):
    graded_as(reward=1.0)
    code, out, err = zero("--max-idle-steps", "3")
    assert (
        code == 3
        and "no group had spread in its rewards, or every rollout was cut, for 3 steps in a row" in err
    )
    assert "take another --name" in err and err.endswith(
        "--resume --max-idle-steps 0\n"
    )  # and this does go on
    assert "step 3: no group of this step has spread in its rewards (mean 1), so it teaches nothing" in out
    code, out, err = zero("--max-idle-steps", "0", "--resume")
    assert code == 0 and "max_idle_steps is 0, was 3" in out


def test_the_stage_that_runs_says_what_confines_programs(zero, tmp_path):
    write_jsonl(tmp_path / "code.jsonl", [{"question": "Add one.", "tests": ["assert f(1) == 2"]}] * 4)
    _, out, err = zero("--problems", str(tmp_path / "code.jsonl"), "--steps", "1")
    assert "zero: programs " in out + err and "grpo" not in out + err


def test_a_run_that_learned_from_no_step_leaves_no_model(zero, monkeypatch, tmp_path):
    monkeypatch.setattr(grpo.Trainer, "advantages", lambda self, graded: [0.0] * len(graded))
    code, _, err = zero()
    assert code == 3 and "zero: no update was applied" in err
    assert not (tmp_path / "micro/zero/model").exists()


def test_completions_that_are_all_cut_are_named(zero):
    code, out, _ = zero("--max-tokens", "1", "--max-idle-steps", "2")
    assert code in (0, 3) and "step 1: all 16 rollouts were cut at 1 tokens: raise --max-tokens" in out


@pytest.mark.parametrize("factor", [float("nan"), 1e6])
def test_bad_updates_are_skipped_then_rolled_back(zero, monkeypatch, tmp_path, factor):
    real = Learner.policy_update

    def update(self, batch, objective, *rest):
        def loss(tokens, **settings):
            value, metrics = objective.loss(tokens, **settings)
            return value * (factor if self.updates >= 4 and self.optim.lr > 6e-4 else 1.0), metrics

        return real(self, batch, dataclasses.replace(objective, loss=loss), *rest)

    monkeypatch.setattr(Learner, "policy_update", update)
    code, out, err = zero("--guard.max-skipped", "2")
    assert code == 0, err
    assert "update 5 skipped: its " in out and "back to step 2, learning rate times 0.5" in out
    rows = [json.loads(line) for line in (tmp_path / "micro/zero/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["optim/lr"] for row in rows] == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 5e-4]
