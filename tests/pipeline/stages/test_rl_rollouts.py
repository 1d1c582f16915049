"""RL with workers, dynamic sampling and a queue: the run that it is without them, where it should be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from pipeline.__main__ import main
from rollout.collect import Plan, RolloutSource, Round, has_spread, sample_groups
from rollout.types import Graded, Problem, Prompt, Rollout, SamplingParams
from tests.small import random_policy


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    """A random policy with its tokenizer, in the shape of a stage's model."""
    folder = tmp_path_factory.mktemp("policy")
    return random_policy(folder, tokenizer, "r1-zero-short", initializer_range=0.1)


def zero(policy, runs, name, *extra):
    """Three steps of R1-Zero; its metrics."""
    argv = [
        "zero",
        "--config",
        "configs/micro/zero.toml",
        "--runs",
        runs,
        "--name",
        name,
        "--init-from",
        policy,
    ]
    argv += ["--threads", 1, "--optim.lr", "1e-3", "--rewards.language", 1, *extra]
    argv += [] if "--steps" in extra else ["--steps", 3]
    assert main(list(map(str, argv))) == 0
    return [json.loads(line) for line in (runs / name / "zero/metrics.jsonl").read_text().splitlines()]


def test_rl_through_a_worker_is_the_run_in_process(policy, tmp_path):
    """The same but for rounding: the worker holds the trainer's weights after each update."""
    for one, two in zip(
        zero(policy, tmp_path, "one"), zero(policy, tmp_path, "pool", "--rollout.workers", 1), strict=True
    ):
        assert two["rollout/version"] == two["step"] - 1 and two["policy/mismatch_kl"] < 1e-10
        for key in ("reward/mean", "rollout/tokens_mean", "optim/grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3)


def same_model(one, two):
    first, second = (load_file(run / "model/model.safetensors") for run in (one, two))
    return all(bool((first[name] == second[name]).all()) for name in first)


def resumed_from(step, run, runs, policy, *flags):
    """The run in `run` as it is when killed after the checkpoint of `step`, gone on with: metrics, folder."""
    again = runs / f"from-{step}/zero"
    again.mkdir(parents=True)
    for file in ("config.toml", "env.json", "metrics.jsonl", "samples.jsonl"):
        text = (run / file).read_text()
        (again / file).write_text(text.replace('name = "whole"', f'name = "from-{step}"'))
    (again / "latest").write_text(f"checkpoint-{step}\n")
    (again / f"checkpoint-{step}").symlink_to(run / f"checkpoint-{step}")
    return zero(policy, runs, again.parent.name, *flags, "--resume"), again


@pytest.mark.parametrize(
    ("depth", "ages", "points", "more"),
    [
        (1, [0, 1, 1, 1], [2], ()),
        (4, [0, 1, 2, 3, 4, 4, 4], [1, 3, 6], ("--dynamic-sampling", "--flat-again", 0.5, "--pool", 24)),
        (4, [0, 2, 4, 4, 4], [3], ("--minibatches", 2, "--kl-coef", 0.01)),
    ],
)
def test_a_queue_is_off_policy_by_its_bound_and_resumes_to_the_same_bits(
    policy, tmp_path, monkeypatch, depth, ages, points, more
):
    monkeypatch.setattr("pipeline.run.checkpoint.KEEP_CHECKPOINTS", 99)
    flags = ("--staleness", depth, "--steps", len(ages), "--max-mismatch-kl", 9, *more)
    logged = zero(policy, tmp_path, "whole", *flags, "--checkpoint-every", 1)
    assert [row["rollout/staleness"] for row in logged] == ages
    assert [row["rollout/staleness_max"] for row in logged] == ages
    assert not any(row["rollout/renewed"] for row in logged)
    assert logged[0]["policy/mismatch_kl"] < 1e-9 < logged[2]["policy/mismatch_kl"]
    once = zero(policy, tmp_path, "once", *flags, "--checkpoint-every", 99, "--eval-every", 0)
    assert [row["reward/mean"] for row in once] == [row["reward/mean"] for row in logged]
    whole = tmp_path / "whole/zero"
    assert same_model(whole, tmp_path / "once/zero")
    for step in points:
        resumed, run = resumed_from(step, whole, tmp_path, policy, *flags, "--checkpoint-every", 1)
        for one, two in zip(logged, resumed, strict=True):
            for key in ("reward/mean", "policy/mismatch_kl", "optim/grad_norm", "rollout/staleness"):
                assert one[key] == two[key], (one["step"], key)
        assert same_model(whole, run)


def test_a_queue_through_workers_is_never_older_than_its_bound(policy, tmp_path):
    flags = ("--steps", 6, "--staleness", 3, "--rollout.workers", 1, "--eval-every", 0)
    for row in zero(policy, tmp_path, "pool", *flags):
        assert 0 <= row["rollout/staleness"] <= row["rollout/staleness_max"] <= min(3, row["step"] - 1)
        assert 0 <= row["rollout/renewed"] <= 1


def test_speculation_and_a_small_cache_are_the_same_run(policy, tmp_path):
    """Nothing but time, and what the engine says of itself, differs."""
    plain = zero(policy, tmp_path, "plain")
    small = zero(policy, tmp_path, "small", "--rollout.local.speculate", "--rollout.local.cache-gib", 1e-4)
    assert not any("rollout/mtp_acceptance" in row or "rollout/preemptions" in row for row in plain)
    for one, two in zip(plain, small, strict=True):
        assert 0 <= two["rollout/mtp_acceptance"] <= 1
        for key in ("reward/mean", "rollout/tokens_mean", "optim/grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3)
    assert any(row.get("rollout/preemptions", 0) > 0 for row in small)


# ---- collection, on an engine that is a list


class Counting:
    """An engine whose rollout `sample` of any prompt is the token `seed + sample`."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []

    def generate(self, prompts, sampling):
        self.requests.append((len(prompts), sampling.seed))
        for i in reversed(range(len(prompts))):
            for s in range(sampling.n):
                yield Rollout(prompts[i], i, s, (s,), (-1.0,), "stop", 3)

    def rest(self):
        return False

    def drain(self):
        return {}

    def load_weights(self, source, version):
        pass

    def close(self):
        pass


def prompts(place, count):
    return [
        Prompt(Problem(str(at), "math", "", tests=("x",)), "raw", (at + 1,))
        for at in range(place, place + count)
    ]


def even_places_teach(rollouts):
    return [
        Graded(r, "", {"a": 1.0}, float(r.sample if int(r.prompt.problem.id) % 2 == 0 else 1))
        for r in rollouts
    ]


def ids(done):
    return [int(g.rollout.prompt.problem.id) for g in done.graded[::2]]


SAMPLING = SamplingParams(max_tokens=4, n=2, seed=7)


def test_dynamic_sampling_refills_until_every_group_has_spread():
    engine = Counting()
    collector = RolloutSource(engine, prompts, even_places_teach, Plan(4, 2, dynamic=True, most_requests=5))
    done = collector.collect(10, SAMPLING)
    assert ids(done) == [10, 12, 14, 16] and done.sampled == 7 and done.cursor == 17
    assert all(has_spread(done.graded[i : i + 2]) for i in range(0, 8, 2))
    assert [n for n, _ in engine.requests] == [4, 2, 1] and len({seed for _, seed in engine.requests}) == 3
    plain = RolloutSource(engine, prompts, even_places_teach, Plan(4, 2)).collect(10, SAMPLING)
    assert ids(plain) == [10, 11, 12, 13] and plain.cursor == 14


def test_dynamic_sampling_ends_where_nothing_has_spread():
    flat = lambda rollouts: [Graded(r, "", {}, 1.0) for r in rollouts]  # noqa: E731
    plan = Plan(3, 2, dynamic=True, most_requests=2)
    done = RolloutSource(Counting(), prompts, flat, plan).collect(0, SAMPLING)
    assert ids(done) == [0, 1, 2] and done.sampled == 6


def test_a_verifier_that_failed_is_no_spread():
    prompt = prompts(0, 1)[0]
    graded = [Graded(Rollout(prompt, 0, s, (s,), (-1.0,), "stop"), "", {}, 1.0, "correct") for s in range(2)]
    failed = Graded(Rollout(prompt, 0, 2, (2,), (-1.0,), "stop"), "", {}, 0.0, "error")
    assert not has_spread([*graded, failed]) and not has_spread([failed, failed])
    assert has_spread([*graded, replace(failed, verdict="incorrect")])


def test_a_round_survives_a_checkpoint():
    done = RolloutSource(Counting(), prompts, even_places_teach, Plan(2, 2)).collect(0, SAMPLING)
    assert Round.from_plain(done.plain()) == done


@pytest.mark.parametrize("fault", ["lost", "doubled"])
def test_a_lost_or_doubled_rollout_is_an_error(fault):
    class Faulty(Counting):
        def generate(self, prompts, sampling):
            all_of_them = list(super().generate(prompts, sampling))
            return iter(all_of_them[1:] if fault == "lost" else [*all_of_them, all_of_them[0]])

    with pytest.raises(RuntimeError, match="lost 1 of 4" if fault == "lost" else "doubled 1"):
        sample_groups(Faulty(), prompts(0, 2), SAMPLING)


def test_an_engine_that_dies_ends_the_run_with_how_to_go_on(policy, tmp_path, monkeypatch, capsys):
    from rollout.engine import EngineDied
    from rollout.native.engine import NativeEngine

    def dies(self, prompts, sampling):
        raise EngineDied("the engine stopped.")

    monkeypatch.setattr(NativeEngine, "generate", dies)
    argv = ["zero", "--config", "configs/micro/zero.toml", "--runs", tmp_path, "--init-from", policy]
    assert main(list(map(str, argv))) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: the engine stopped. To go on") and said.endswith("--resume")
