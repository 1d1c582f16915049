"""One step of RL, piece by piece: what is sampled, what is graded, what is updated and what stops it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.errors import Stopped
from pipeline.run.directory import open_run
from pipeline.settings.common import OptimSettings
from pipeline.settings.rollouts import CorrectionSettings, GrpoSettings
from pipeline.stages.grpo import Trainer
from pipeline.table import STAGES
from pipeline.train.rollouts import rollout_metrics
from rewards.style import soft_overlong
from tests.small import random_policy

STAGE = next(stage for stage in STAGES if stage.name == "zero")
LONGEST = 24


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


@pytest.fixture
def trainer(policy, tmp_path):
    """`trainer(**settings)`: of a random policy on sums; language is what its rewards differ by."""
    opened = []

    def make(**settings):
        config = GrpoSettings(
            **{
                "runs": tmp_path, "init_from": str(policy), "template": "r1-zero-short", "pool": 6,
                "problems": ("generator:sum",), "eval_every": 0, "prompts_per_step": 4, "group_size": 4,
                "max_tokens": LONGEST, "kl_coef": 0.0, "threads": 1,
                "rewards": {"accuracy": 1.0, "language": 1.0}, "optim": OptimSettings(lr=1e-3), **settings,
            }
        )  # fmt: skip
        run = open_run(STAGE, config, "make zero")
        opened.append((run, Trainer(config, run.__enter__())))
        return opened[-1][1]

    yield make
    for run, made in opened:
        made.close()
        run.__exit__(None, None, None)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def sampled(it, step=1):
    return list(it.source.collect(0, it.sampling(step)).graded)


def spread(graded):
    """Advantages that teach, whatever was sampled."""
    return [1.0 if at % 2 else -1.0 for at in range(len(graded))]


def test_rollouts_of_other_weights_stop_the_run(trainer):
    it = trainer(max_mismatch_kl=1e-3)
    graded = sampled(it)
    it.update(it.batches(graded, spread(graded)))  # its own: no word
    off = [
        dataclasses.replace(
            g, rollout=dataclasses.replace(g.rollout, logprobs=tuple(x - 1 for x in g.rollout.logprobs))
        )
        for g in graded
    ]
    with pytest.raises(Stopped, match="do not come from these weights"):
        it.update(it.batches(off, spread(off)))


def test_the_length_punishment_is_part_of_the_reward(trainer):
    weights = {"accuracy": 1.0, "language": 1.0, "overlong": 0.5}
    plain, punished = (
        sampled(trainer(name="plain")),
        sampled(trainer(name="punished", rewards=weights, overlong_buffer=LONGEST - 2)),
    )
    assert any(g.parts["overlong"] < 0 for g in punished)
    for without, graded in zip(plain, punished, strict=True):
        assert without.rollout.token_ids == graded.rollout.token_ids and "overlong" not in without.parts
        want = soft_overlong(len(graded.rollout.token_ids), LONGEST, LONGEST - 2)
        assert graded.parts["overlong"] == want
        assert graded.reward == pytest.approx(without.reward + 0.5 * want)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"overlong_buffer": 97}, "overlong_buffer=97 must be at most max_tokens=96"),
        ({"overlong_buffer": -1}, "overlong_buffer=-1 must be at least 0"),
        ({"overlong_buffer": 8}, "overlong_buffer=8 and the weight of the reward overlong .* only together"),
        (
            {"rewards": {"overlong": 1.0}},
            "overlong_buffer=0 and the weight of the reward overlong .* only together",
        ),
        ({"rewards": {"acuracy": 1.0}}, "did you mean accuracy"),
        ({"dual_clip": 1.0}, "dual_clip=1 must be above 1, or 0"),
        ({"kl_estimator": "unbiased", "kl_coef": 0.0}, "kl_estimator=unbiased has no effect with kl_coef=0"),
    ],
)
def test_rewards_and_objectives_that_cannot_be_are_refused_with_the_settings(settings, error):
    with pytest.raises(ValueError, match=error):
        GrpoSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"low": 1.1}, "low=1.1 must be in .0, 1."),
        ({"high": 0.9}, "high=0.9 must be at least 1"),
        (
            {"treatment": "mask", "high": 1.0},
            "mask with bounds 0 and 1 masks where engine and trainer agree",
        ),
        ({"treatment": "mask", "low": 1.0}, "set low below 1"),
        ({"anchor": "engine", "level": "sequence"}, "anchor=engine leaves nothing to correct"),
        ({"anchor": "engine", "high": 3.0}, "anchor=engine leaves nothing to correct"),
    ],
)
def test_corrections_that_cannot_be_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        CorrectionSettings(**settings)


def test_the_reference_stays_until_it_is_refreshed(trainer):
    it = trainer(kl_coef=0.01, ref_refresh_steps=2, steps=2)
    start = weights(it.policy)
    it.step(1)
    assert not torch.equal(weights(it.policy), start) and torch.equal(weights(it.reference), start)
    it.step(2)
    assert torch.equal(weights(it.reference), weights(it.policy))
    assert not any(p.requires_grad for p in it.reference.parameters())


def test_each_problem_comes_once_an_epoch_in_an_order_of_its_own(trainer):
    it = trainer()
    epochs = [[p.problem.id for p in it.prompts(6 * epoch, 6)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    across = [p.problem.id for p in it.prompts(4, 4)]
    assert across == epochs[0][4:] + epochs[1][:2]


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_a_step_takes_one_update_a_minibatch(trainer, minibatches):
    it = trainer(minibatches=minibatches)
    graded = sampled(it)
    before = weights(it.policy)
    it.update(it.batches(graded, spread(graded)))
    assert it.learner.updates == minibatches and not torch.equal(weights(it.policy), before)


def test_cut_rollouts_have_no_weight_and_no_place_in_the_denominator_but_a_vote_in_their_group(trainer):
    it = trainer(overlong_filter=True, name="filtered")
    graded = [
        dataclasses.replace(
            g,
            reward=float(at % 2),
            verdict="correct",
            rollout=dataclasses.replace(g.rollout, finish_reason="length" if at % 4 == 1 else "stop"),
        )
        for at, g in enumerate(sampled(it))
    ]
    advantages = it.advantages(graded)
    assert advantages == [-1.0, 1.0] * 8  # a right answer of two was cut
    (batch,) = it.batches(graded, advantages)
    kept = [g.rollout for g in graded if g.rollout.finish_reason == "stop"]
    assert len(kept) == 12
    assert sorted(batch.lengths) == sorted(len(r.prompt.token_ids) + len(r.token_ids) for r in kept)
    assert sum(w.sum() for part in batch.parts for w in (e.weights for e in part)) == pytest.approx(1.0)
    (whole,) = trainer(name="whole").batches(graded, advantages)
    assert len(whole.lengths) == 16
    cut = [
        dataclasses.replace(g, rollout=dataclasses.replace(g.rollout, finish_reason="length")) for g in graded
    ]
    assert it.update(it.batches(cut, advantages)) == {} and it.learner.updates == 0


@pytest.mark.parametrize("setting", ["kl_coef", "entropy_coef"])
def test_groups_without_spread_are_trained_on_where_something_else_teaches(trainer, setting):
    flat = [0.0] * 16
    without, with_it = trainer(name="without"), trainer(name="with", **{setting: 0.01})
    graded = sampled(without)
    assert [batch.parts for batch in without.batches(graded, flat)] == [[]]
    (batch,) = with_it.batches(graded, flat)
    assert len(batch.lengths) == 16


def test_the_engine_as_anchor_needs_no_scoring_and_measures_the_mismatch_before_the_first_update(
    trainer, monkeypatch
):
    it = trainer(minibatches=2, optim=OptimSettings(lr=1e-2), correction=CorrectionSettings(anchor="engine"))
    monkeypatch.setattr("pipeline.stages.grpo.score", lambda *args: pytest.fail("scored"))
    real, found = it.learner.policy_update, []

    def update(*args):
        found.append(real(*args))
        return dict(found[-1])

    monkeypatch.setattr(it.learner, "policy_update", update)
    graded = sampled(it)
    metrics = it.update(it.batches(graded, spread(graded)))
    first, last = found
    assert metrics["policy/mismatch_max"] == first["policy/mismatch_max"] < 1e-4
    assert last["policy/mismatch_max"] > 1e-3 and metrics["loss/policy"] == last["loss/policy"]


def test_groups_whose_rewards_differ_are_counted(trainer):
    it = trainer()
    metrics, records = it.step(1)
    groups = [{r["advantage"] for r in records[at : at + 4]} - {0.0, None} for at in range(0, 16, 4)]
    assert len(records) == 16
    assert metrics["reward/groups_with_spread"] == pytest.approx(sum(map(bool, groups)) / 4)


def test_what_the_verifier_failed_on_teaches_nothing_and_is_counted(trainer):
    it = trainer()
    graded = [dataclasses.replace(g, verdict="error") if at < 4 else g for at, g in enumerate(sampled(it))]
    advantages = [None] * 4 + [0.0] * 12
    before = weights(it.policy)
    it.update(it.batches(graded, advantages))  # nothing is left that could teach
    assert torch.equal(weights(it.policy), before) and it.learner.updates == 0
    metrics = rollout_metrics(graded)
    assert metrics["reward/errors"] == 4
    assert metrics["reward/mean"] == pytest.approx(sum(g.reward for g in graded[4:]) / 12)


def test_a_metric_of_ours_without_a_line_in_the_glossary_is_a_defect(trainer, monkeypatch):
    """Only a user's loss explains its metrics by itself."""
    it = trainer()
    monkeypatch.setattr(
        it.learner, "policy_update", lambda *args: {"policy/mismatch_kl": 0.0, "loss/forgotten": 1.0}
    )
    metrics, _ = it.step(1)
    with pytest.raises(KeyError, match="loss/forgotten"):
        it.run_dir.log(1, 1, metrics)
