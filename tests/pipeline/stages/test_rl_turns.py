"""RL with an environment: what trains, what is graded and logged, and a run that resumes to the same bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.dense import DensePolicy
from pipeline.__main__ import main
from pipeline.doctor.live import LiveDoctor
from pipeline.settings.common import OptimSettings
from pipeline.settings.rollouts import CorrectionSettings
from pipeline.train.learner import Learner, PolicyObjective
from pipeline.train.losses import LOSSES
from pipeline.train.pack import pack, rollout_weights
from pipeline.train.rollouts import example
from rewards.reward import Scorer
from rollout.collect import Round
from rollout.types import Problem, Prompt, Rollout
from tests.small import llama, random_policy

OWN = """
def two(problem):
    def step(messages):
        return "seen" if len(messages) < 4 else 0.5
    return step

two.stop = ("e", "1", "u", "a", "o")

def bad(problem):
    def step(messages):
        raise KeyError("board")
    return step
"""


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


@pytest.fixture
def zero(policy, tmp_path, monkeypatch, root):
    """`zero(name, *flags)`: exit code and the stage's folder; the working directory has `tools.py`."""
    (tmp_path / "r1_turns_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def run(name, *flags, environment="r1_turns_test:two"):
        argv = ["zero", "--config", root / "configs/micro/zero.toml", "--runs", tmp_path, "--name", name]
        argv += ["--threads", 1, "--init-from", policy, "--environment", environment, "--optim.lr", "1e-3"]
        argv += ["--rewards.language", 1, "--rewards.environment", 1, "--steps", 4, *flags]
        return main([str(arg) for arg in argv]), tmp_path / name / "zero"

    return run


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_turns_replays_and_resumes_to_the_same_bits(zero, tmp_path, capsys):
    code, whole = zero("whole", "--checkpoint-every", 2, "--record", 3)
    assert code == 0
    rows = logged(whole)
    assert all(row["policy/mismatch_kl"] < 1e-9 for row in rows if "policy/mismatch_kl" in row)
    assert any(row["rollout/observed"] > 0 and row["reward/environment"] > 0 for row in rows)
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    told = [s for s in samples if "turns" in s]
    assert told and all(s["turns"][1][0] == "environment" and "seen" in s["turns"][1][1] for s in told)
    assert not any("seen" in s["text"] for s in told)

    again = tmp_path / "again/zero"
    again.mkdir(parents=True)
    for file in ("config.toml", "env.json", "metrics.jsonl", "samples.jsonl", "latest"):
        (again / file).write_text((whole / file).read_text().replace('name = "whole"', 'name = "again"'))
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    (again / "latest").write_text("checkpoint-2\n")
    assert zero("again", "--checkpoint-every", 2, "--record", 3, "--resume")[0] == 0
    one, two = (load_file(folder / "model/model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    assert main(["replay", str(whole), "--step", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["same_bits"]
    assert main(["doctor", str(whole), "--model", str(whole / "model")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert {each["kind"] for each in told} == {"silent_zero"}, told  # right answers, of random weights


def test_an_environment_that_fails_is_counted_and_stops_the_run(zero, capsys):
    code, folder = zero("bad", "--max-error-share", 0.01, environment="r1_turns_test:bad")
    said = capsys.readouterr()
    assert code == 3 and "the verifier failed on more than 1%" in said.err
    assert "KeyError: 'board'" in said.out + said.err
    assert logged(folder)[0]["reward/errors"] > 0


def test_a_queue_and_a_pool_play_the_same_environment(zero):
    rows = logged(zero("ahead", "--staleness", 2, "--max-turns", 2)[1])
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 2, 2]
    assert all(row["rollout/observations"] <= 1 for row in rows if "rollout/observations" in row)
    here, pool = (
        logged(zero(name, "--steps", 2, *flags)[1])
        for name, flags in (("here", ()), ("pool", ("--rollout.workers", 1)))
    )
    assert here[0]["rollout/observed"] > 0
    for name in ("rollout/observed", "rollout/tokens_mean", "reward/mean"):
        assert [row[name] for row in here] == [row[name] for row in pool], name


def rollouts(several):
    """Of random tokens; `several` have observations."""
    generator, out = torch.Generator().manual_seed(0), []
    for i in range(6):
        prompt = Prompt(Problem(str(i), "math", "?"), "raw", (3 + i, 4, 5))
        ids = torch.randint(3, 90, (9 + i,), generator=generator).tolist()
        logprobs = (-torch.rand(len(ids), generator=generator)).tolist()
        spans = ((2, 5), (6, 8)) if several and i % 2 else ()
        for first, end in spans:
            logprobs[first:end] = [0.0] * (end - first)
        out.append(Rollout(prompt, i, 0, ids, logprobs, "stop", observed=spans))
    return out


def gradient(trained, weights, loss, micro=64):
    """Of one update on rollouts with these token weights; its metrics, and what the live doctor measures."""
    policy = DensePolicy(llama()).train()
    learner = Learner(policy, OptimSettings(lr=1e-9), 1)
    found = {}
    learner.guard.accepts = lambda norm, finite=True: found.update(
        {name: p.grad.clone() for name, p in policy.named_parameters()}
    )
    batch = pack([example(r, 1.0 - r.index / 2, w) for r, w in zip(trained, weights, strict=True)], micro)
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}
    settings |= {"kl_estimator": "k3"} if loss in ("gspo", "cispo") else {}
    objective = PolicyObjective(LOSSES[loss], settings, 1.0, CorrectionSettings())
    metrics = learner.policy_update(batch, objective, None, None)
    return found, metrics, LiveDoctor(frozenset(), stale=False).gaps(1.0, learner.scored)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo", "cispo"])
def test_single_turn_gradients_do_not_change_beside_rollouts_of_several_turns(loss):
    """The gradient of a batch is the sum over its parts, each in the weights that the batch gave it."""
    made = rollouts(several=True)
    weights = rollout_weights([r.sampled for r in made], LOSSES[loss].per, 20)
    alone = [i for i, r in enumerate(made) if not r.observed]
    beside = [i for i, r in enumerate(made) if r.observed]
    whole, metrics, _ = gradient(made, weights, loss)
    parts = [gradient([made[i] for i in of], [weights[i] for i in of], loss)[0] for of in (alone, beside)]
    for name, value in whole.items():
        assert (value - parts[0][name] - parts[1][name]).abs().max() < 1e-6 * max(1.0, value.abs().max())
    assert metrics["policy/mismatch_kl"] > 0


def test_observations_are_out_of_loss_metrics_and_denominators():
    """What an environment wrote may have any log-probability: nothing changes but the context it is."""
    made = rollouts(several=True)
    changed = []
    for r in made:
        logprobs = list(r.logprobs)
        for first, end in r.observed:
            logprobs[first:end] = [-9.0] * (end - first)
        changed.append(replace(r, logprobs=logprobs))
    weights = rollout_weights([r.sampled for r in made], "token", 20)
    (one, *told), (two, *same) = (gradient(of, weights, "dapo") for of in (made, changed))
    assert told == same and told[1]["gap/kl"] > 0 and all(torch.equal(one[name], two[name]) for name in one)
    scored = sum(r.sampled for r in made)
    assert sum(w * r.sampled for w, r in zip(weights, made, strict=True)) == pytest.approx(1.0)
    batch = pack([example(r, 1.0, w) for r, w in zip(made, weights, strict=True)], 64)
    assert batch.scored == scored < sum(len(r.token_ids) for r in made)
    assert all(r.sampled == sum(len(ids) for own, ids in r.turns if own) for r in made)


def test_a_failed_environment_is_a_failed_verdict_and_travels_through_a_checkpoint():
    made = [replace(r, failure="the environment failed: x", score=0.25) for r in rollouts(several=True)]
    with Scorer({"accuracy": 1.0, "environment": 1.0}) as scorer:
        graded = scorer.grade_all((r, "1") for r in made)
    assert all(g.verdict == "error" and g.detail == "the environment failed: x" for g in graded)
    assert all(g.parts["environment"] == 0.25 for g in graded)
    done = Round(tuple(graded), 0, 1)
    back = Round.from_plain(done.plain())
    assert [g.rollout.observed for g in back.graded] == [r.observed for r in made]
    assert [g.rollout for g in back.graded] == [g.rollout for g in graded]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--environment", "pyton"], "no environment 'pyton'; there are python"),
        (["--environment", "nowhere:f"], "environment 'nowhere:f': no file nowhere.py"),
        (["--environment", "os:getcw"], "os has no function 'getcw'; did you mean os:"),
        (["--environment", "verifiers:wordle"], "'verifiers:wordle' cannot be loaded (ModuleNotFoundError"),
        (["--max-turns", "3"], "max_turns has no effect without an environment"),
        (["--rewards.environment", "1"], "the reward environment has no effect without one"),
        (["--environment", "python", "--max-turns", "1"], "must be"),
        (["--environment", "python", "--inject", "eos"], "inject='eos' is for rollouts of one turn"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(policy, tmp_path, flags, says, capsys, root):
    config = Path(root) / "configs/micro/zero.toml"
    line = ["zero", "--config", str(config), "--runs", str(tmp_path), "--init-from", str(policy)]
    assert main([*line, *flags]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1
