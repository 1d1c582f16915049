"""MTP modules that learn from rollouts: the trunk does not notice, the modules guess it better."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from model import TINY
from model.dense import DensePolicy
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner, PolicyObjective
from pipeline.train.losses import grpo
from pipeline.train.pack import Example, pack
from tests.small import llama

CONFIG = dataclasses.replace(
    TINY, vocab_size=40, hidden_size=32, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=16,
    n_routed_experts=4, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, num_nextn_predict_layers=2, initializer_range=0.2,
)  # fmt: skip
PROMPT, COMPLETION = 4, 7
OBJECTIVE = PolicyObjective(grpo, {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}, 0.7)


def learner(coef, **optim):
    it = Learner(Transformer(CONFIG, seed=0).train(), OptimSettings(**{"lr": 1e-2, **optim}), 10)
    if coef:
        it.train_drafts(coef)
    return it


def rollouts(micro_tokens=1000):
    generator = torch.Generator().manual_seed(0)
    weights = [0.0] * PROMPT + [0.01] * COMPLETION
    texts = torch.randint(1, 40, (6, PROMPT + COMPLETION), generator=generator).tolist()
    examples = [Example(text, weights, [0.0] * len(text), (-1.0) ** i) for i, text in enumerate(texts)]
    return texts, pack(examples, micro_tokens)


def split(net):
    """Parameters of trunk and modules, flat."""
    named = list(net.named_parameters())
    both = ([p for name, p in named if name.startswith("mtp.") is of] for of in (False, True))
    return tuple(torch.cat([p.detach().flatten() for p in of]) for of in both)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_trunk_is_trained_to_the_same_bits_with_and_without(precision):
    """Gradients, and updates behind a clip that both would share."""
    _, batch = rollouts()
    grads, nets = {}, {}
    for coef in (0.0, 50.0):
        it = learner(coef, precision=precision, clip=0.05)
        it.policy.state_dict()
        before, step = split(it.policy), it._step

        def look(sums, step=step, it=it, coef=coef):
            it.weights.collect()
            mine = [name for name, _ in it.policy.named_parameters() if not name.startswith("mtp.")]
            stepped = dict(zip([n for n, _ in it.policy.named_parameters()], it.weights.stepped, strict=True))
            grads[coef] = [stepped[name].grad.clone() for name in mine]
            return step(sums)

        it._step = look
        metrics = it.policy_update(batch, OBJECTIVE, None, None)
        for _ in range(2):
            it.policy_update(batch, OBJECTIVE, None, None)
        nets[coef] = split(it.policy)
        assert metrics["optim/grad_norm"] > 0.05  # clipped
        assert torch.equal(nets[coef][1], before[1]) is (coef == 0)
    assert all(torch.equal(a, b) for a, b in zip(grads[0.0], grads[50.0], strict=True))
    assert torch.equal(nets[0.0][0], nets[50.0][0])


@pytest.mark.parametrize("micro_tokens", [1000, 1])
def test_the_loss_is_the_cross_entropy_of_sampled_tokens_at_the_temperature(micro_tokens):
    """By hand, token by token: of completion tokens alone, and a mean over them and the two modules."""
    texts, batch = rollouts(micro_tokens)
    it = learner(1.0)
    total = 0.0
    for text in texts:
        _, states = it.policy.hidden_and_mtp(torch.tensor([text]))
        for k, module in enumerate(states, start=2):
            logits = it.policy.head(module)[0].double() / OBJECTIVE.temperature
            for at in range(PROMPT, len(text)):
                z = logits[at - k].tolist()
                total += math.log(sum(map(math.exp, z))) - z[text[at]]
    metrics = it.policy_update(batch, OBJECTIVE, None, None)
    want = total / (2 * 6 * COMPLETION)
    assert metrics["loss/mtp"] == pytest.approx(want, rel=1e-5)
    assert metrics["loss/total"] == pytest.approx(metrics["loss/policy"] + want, rel=1e-5)


def test_the_modules_learn_and_their_router_is_balanced():
    _, batch = rollouts()
    it = learner(1.0, router_bias_gamma=0.01)
    losses = [it.policy_update(batch, OBJECTIVE, None, None)["loss/mtp"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.2
    assert it.policy.mtp[0].mlp.gate.e_score_correction_bias.abs().max() > 0
    assert "loss/mtp" not in learner(0.0).policy_update(batch, OBJECTIVE, None, None)


def test_a_module_whose_gradient_is_not_finite_skips_the_update():
    _, batch = rollouts()
    it = learner(1.0)
    module = it.policy.mtp[1].eh_proj.weight
    module.register_hook(lambda grad: grad * float("inf"))
    before = split(it.policy)
    assert it.policy_update(batch, OBJECTIVE, None, None)["optim/skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(split(it.policy), before, strict=True))


def test_a_policy_without_modules_is_refused():
    for policy in (
        DensePolicy(llama()),
        Transformer(dataclasses.replace(CONFIG, num_nextn_predict_layers=0)),
    ):
        with pytest.raises(UserError, match="mtp_coef is for policies with MTP modules"):
            Learner(policy, OptimSettings(lr=1e-3), 1).train_drafts(0.1)
