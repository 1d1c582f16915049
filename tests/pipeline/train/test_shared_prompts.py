"""The prompt of a group once in a row: the same loss, the same gradients, whatever the micro-batches."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from model.dense import DensePolicy
from model.kernels.packed import Packed, fold, unfold
from model.transformer import Transformer
from pipeline.__main__ import main
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner, PolicyObjective, score
from pipeline.train.losses import grpo
from pipeline.train.pack import UNFOLDED, Example, Micro, pack
from tests.small import VOCAB, bias_gates, llama, random_policy, tiny

OBJECTIVE = PolicyObjective(
    grpo, {"clip_low": 0.01, "clip_high": 0.01, "kl_coef": 0.1}, 0.9, entropy_coef=0.1
)
PROMPTS = [(4, 3), (9, 4), (1, 2), (20, 3)]
"""Tokens and samples of each."""


def made(share, routes=None):
    """Samples of every prompt; lengths, log-probabilities and advantages all differ."""
    rng, examples = np.random.default_rng(0), []
    for tokens, samples in PROMPTS:
        prompt = rng.integers(3, VOCAB, tokens)
        for _ in range(samples):
            ids = np.concatenate([prompt, rng.integers(3, VOCAB, int(rng.integers(1, 12)))])
            flags = np.arange(len(ids)) >= tokens
            logprobs = np.where(flags, -4.5 + 0.05 * rng.normal(size=len(ids)), 0)
            one = Example(ids, flags * rng.uniform(0.01, 0.1), logprobs, float(rng.normal()))
            if routes is not None:
                one = dataclasses.replace(one, routed_experts=routes(one))
            examples.append(dataclasses.replace(one, prefix=tokens if share else 0))
    return examples


def native(**changes):
    net = bias_gates(Transformer(tiny(VOCAB, **changes), seed=0), 0.1, torch.Generator().manual_seed(0))
    return net


def gradients(policy, batch, recompute=False):
    """Metrics and gradient of one update."""
    learner, found = Learner(policy.train(), OptimSettings(recompute=recompute), 1), []
    old = [score(policy, part, 0.9, part.routed_experts) + 0.02 for part in batch.micro_batches()]
    reference = policy.frozen()

    def keep(sums):
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        policy.zero_grad()
        return {name: float(value) for name, value in sums.items()}

    learner._step = keep
    return learner.policy_update(batch, OBJECTIVE, old, reference), *found


@pytest.mark.parametrize("micro_tokens", [1000, 60, 25, 1])
@pytest.mark.parametrize("kind", ["native", "dense", "recomputed"])
def test_loss_and_gradients_are_those_of_the_samples_apart(kind, micro_tokens):
    of = DensePolicy(llama()) if kind == "dense" else native()
    apart, whole = gradients(of, pack(made(False), 1000))
    together, shared = gradients(of, pack(made(True), micro_tokens), kind == "recomputed")
    assert together == pytest.approx(apart, rel=1e-5, abs=1e-6)
    assert (shared - whole).norm() < 1e-6 * whole.norm()


def test_recorded_routes_keep_their_tokens():
    config = tiny(VOCAB)
    shape, experts = config.routed_shape, config.n_routed_experts

    def routes(one):
        """Of a prompt's tokens the same in every sample, as one prefill records them."""
        table = np.random.default_rng(7).permuted(np.tile(np.arange(experts), (VOCAB, shape[0], 1)), axis=2)
        return torch.from_numpy(table[one.token_ids[:-1], :, : shape[1]].astype(np.uint8))

    of = native()
    apart, whole = gradients(of, pack(made(False, routes), 1000))
    together, shared = gradients(of, pack(made(True, routes), 60))
    assert together == pytest.approx(apart, rel=1e-5, abs=1e-6)
    assert (shared - whole).norm() < 1e-6 * whole.norm()


def test_a_row_by_hand():
    prompt = [7, 8]
    a, b, c = (
        Example([*prompt, *rest], [0.0, 0.0, *[0.5] * len(rest)], prefix=2) for rest in ([1, 2], [3], [4, 5])
    )
    other = Example([7, 9, 6], [0.0, 0.5, 0.5], prefix=2)
    micro = Micro.of([a, b, c, other])
    assert micro.token_ids.tolist() == [[7, 8, 1, 2, 3, 4, 5, 7, 9, 6]]
    assert micro.packed.positions.tolist() == [[0, 1, 2, 3, 2, 2, 3, 0, 1, 2]]
    assert micro.packed.lengths == (4, 3, 4, 3) and micro.positions.tolist() == [2, 3, 2, 2, 3, 1, 2]
    assert micro.ahead(1)[0].tolist() == [1, 2, 1, 1, 5, 7, 8]
    assert micro.rollout.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert pack([a, b, c, other], 100).lengths == [4, 1, 2, 3]
    full = unfold(micro.token_ids[0], micro.packed)
    assert full.tolist() == [7, 8, 1, 2, 7, 8, 3, 7, 8, 4, 5, 7, 9, 6]
    assert torch.equal(fold(full, micro.packed), micro.token_ids[0])


@pytest.mark.parametrize("move", [unfold, fold])
def test_the_gradients_of_folding_are_finite_differences(move):
    packed = Packed.of([4, 3, 5, 2], prefixes=[0, 2, 2, 0])
    rows = 14 if move is fold else 10
    x = torch.randn(rows, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: move(x, packed), x)


def test_samples_of_a_prompt_stay_together_as_far_as_they_fit():
    examples = [Example([5] * 10 + [i], [0.0] * 10 + [1.0], prefix=10) for i in range(7)]
    parts = pack(examples, 13).parts
    assert sorted(len(part) for part in parts) == [1, 3, 3]
    assert all(part.token_ids.shape[1] <= 13 for part in pack(examples, 13).micro_batches())


def test_attention_of_shared_prompts_has_a_bound_too():
    examples = [Example([5] * 40 + [i], [0.0] * 40 + [1.0], prefix=40) for i in range(30)]
    for part in pack(examples, 64).micro_batches():
        assert sum(part.packed.lengths) <= UNFOLDED * 64 and part.token_ids.shape[1] <= 64


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


def test_a_run_is_the_run_without_it_to_rounding(policy, tmp_path, root):
    found = []
    for name, flags in (("apart", ()), ("together", ("--share-prompts", "--micro-tokens", "400"))):
        argv = ["zero", "--config", root / "configs/micro/zero.toml", "--runs", tmp_path, "--name", name]
        argv += ["--init-from", policy, "--steps", 2, "--rewards.language", 1, "--kl-coef", 0.1, *flags]
        assert main([str(arg) for arg in argv]) == 0
        lines = (tmp_path / name / "zero/metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    apart, together = found
    for name in ("loss/total", "optim/grad_norm", "policy/entropy", "loss/kl_ref"):
        assert together[0][name] == pytest.approx(apart[0][name], rel=1e-4, abs=1e-7), name
    assert together[0]["data/tokens"] < 0.9 * apart[0]["data/tokens"]


@pytest.mark.parametrize("flags", [("--mtp-coef", "0.1"), ("--optim.balance-alpha", "0.1")])
def test_what_needs_every_sequence_in_full_is_refused(flags, root, capsys):
    argv = ["zero", "--config", str(root / "configs/micro/zero.toml"), "--share-prompts", *flags]
    assert main(argv) == 2
    assert "share_prompts is not for" in capsys.readouterr().err
