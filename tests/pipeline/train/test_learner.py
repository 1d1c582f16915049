"""One update is the same update however it is split, packed or resumed; and it survives a NaN."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from model import TINY
from model.dense import DensePolicy
from model.moe import load_metrics
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.settings.common import OptimSettings
from pipeline.settings.rollouts import CorrectionSettings
from pipeline.train.learner import Learner, PolicyObjective, learning_rate, score
from pipeline.train.losses import LOSSES, grpo
from pipeline.train.pack import Example, mean_weights, pack, rollout_weights
from tests.small import llama

MICRO = dataclasses.replace(
    TINY,
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
CLIP = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}
OBJECTIVE = PolicyObjective(grpo, CLIP, temperature=1.0)


def learner(mtp_coef=0.0, gamma=0.0, lr=1e-3):
    optim = OptimSettings(lr=lr, router_bias_gamma=gamma)
    return Learner(Transformer(MICRO, seed=0).train(), optim, 10, mtp_coef=mtp_coef)


def sequences(n=9, seed=0):
    torch.manual_seed(seed)
    return [torch.randint(1, 40, (int(k),)).tolist() for k in torch.randint(3, 14, (n,))]


def supervised(micro_tokens, texts):
    weights = mean_weights([[True] * len(t) for t in texts])
    return pack([Example(t, w) for t, w in zip(texts, weights, strict=True)], micro_tokens)


def parameters(it):
    return torch.cat([p.detach().flatten() for p in it.policy.parameters()])


@pytest.mark.parametrize("mtp_coef", [0.0, 0.3])
def test_micro_batches_and_packing_cannot_change_the_update(mtp_coef):
    texts, results = sequences(), []
    for micro_tokens in (1, 14, 30, 1000):
        it = learner(mtp_coef)
        metrics = it.supervised_update(supervised(micro_tokens, texts))
        results.append((metrics["loss/lm"], metrics["optim/grad_norm"], metrics.get("loss/mtp", 0.0)))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=2e-5)


def test_the_supervised_loss_is_the_mean_cross_entropy():
    texts, it = sequences(), learner()
    per_token = []
    for text in texts:
        logits = it.policy.logits(torch.tensor([text]))[0].double().log_softmax(-1)
        per_token += [-logits[i - 1, text[i]].item() for i in range(1, len(text))]
    assert it.supervised_update(supervised(40, texts))["loss/lm"] == pytest.approx(
        sum(per_token) / len(per_token), rel=1e-5
    )


def rollouts(policy, micro_tokens=1000):
    """Completions of four tokens with true log-probabilities, as an engine would record them."""
    texts, examples = [t for t in sequences() if len(t) > 5], []
    weights = rollout_weights([4] * len(texts), "token", 8)
    for i, (text, weight) in enumerate(zip(texts, weights, strict=True)):
        with torch.no_grad():
            logits = policy.eval().logits(torch.tensor([text]))[0].log_softmax(-1)
        policy.train()
        sampled = [logits[t - 1, text[t]].item() for t in range(len(text) - 4, len(text))]
        zeros = [0.0] * (len(text) - 4)
        examples.append(Example(text, [*zeros, *[weight] * 4], [*zeros, *sampled], advantage=(-1.0) ** i))
    return pack(examples, micro_tokens)


def test_a_policy_update_raises_what_did_well_and_lowers_what_did_not():
    it = learner(lr=1e-2)
    batch = rollouts(it.policy)
    (micro,) = batch.micro_batches()
    before = score(it.policy, micro, 1.0)
    metrics = it.policy_update(batch, OBJECTIVE, None, None)
    change = (score(it.policy, micro, 1.0) - before) * micro.advantages
    assert change.mean() > 0.01
    assert metrics["policy/mismatch_max"] < 1e-4  # engine and trainer agree here
    assert metrics["loss/kl_ref"] == 0


def test_stale_rollouts_show_up_as_mismatch():
    it = learner(lr=1e-2)
    batch = rollouts(it.policy)
    it.policy_update(batch, OBJECTIVE, None, None)
    assert it.policy_update(batch, OBJECTIVE, None, None)["policy/mismatch_kl"] > 1e-4


def perturbed(policy, micro_tokens, order):
    """`rollouts` in another order and packing; an engine whose log-probabilities are off by 0.1 and more."""
    examples = [e for part in rollouts(policy).parts for e in part]
    examples = sorted(examples, key=lambda e: e.token_ids)
    for n, e in enumerate(examples):
        off = 0.06 * (n % 3 - 1) + 0.1 * np.sin(np.arange(len(e.token_ids)) + n)
        examples[n] = dataclasses.replace(e, rollout_logprobs=np.asarray(e.rollout_logprobs) + off)
    return pack([examples[at] for at in order(range(len(examples)))], micro_tokens)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_order_and_packing_cannot_change_the_gradient_of_a_policy_loss(loss, level):
    """With an old policy, a reference and an entropy bonus; each micro-batch has its own of all of them."""
    old, reference = (Transformer(MICRO, seed=seed).eval().requires_grad_(False) for seed in (1, 2))
    settings = {"clip_low": 1e-3, "clip_high": 1e-3, "kl_coef": 0.1, "kl_estimator": "unbiased"}
    low, high = (0.96, 1.04) if level == "geometric" else (0.9, 1.1)
    bounds = CorrectionSettings(level=level, treatment="mask", low=low, high=high)
    objective = PolicyObjective(LOSSES[loss], settings, 0.9, bounds, entropy_coef=0.1)
    found = []
    for micro_tokens, order in ((1000, list), (1, list), (14, reversed), (30, reversed)):
        it, gradient = learner(), []
        batch = perturbed(old, micro_tokens, order)
        logprobs = [score(old, part, 0.9) for part in batch.micro_batches()]
        it._step = lambda sums, it=it, out=gradient: (
            out.append(torch.cat([p.grad.flatten() for p in it.policy.parameters() if p.grad is not None]))
            or sums
        )
        sums = it.policy_update(batch, objective, logprobs, reference)
        assert 0 < sums["policy/corrected"] < 1 and 0 < sums["loss/clip_frac"] < 1
        found.append((*gradient, float(sums["policy/corrected"])))
    (first, corrected), *others = found
    for gradient, share in others:
        assert share == pytest.approx(corrected)
        assert (gradient - first).norm() < 1e-6 * first.norm()


def test_the_anchor_is_the_old_policy_or_the_engine():
    """What the loss sees: by default the trainer's old policy and corrected advantages."""
    old, seen = Transformer(MICRO, seed=1).eval().requires_grad_(False), []

    def spy(tokens):
        seen.append(tokens)
        return tokens.logprobs.sum(), {}

    for anchor in ("old", "engine"):
        it, bounds = learner(), CorrectionSettings(anchor=anchor)
        batch = perturbed(old, 1000, list)
        (part,) = batch.micro_batches()
        scored = score(old, part, 1.0)
        metrics = it.policy_update(batch, PolicyObjective(spy, {}, 1.0, bounds), [scored], None)
        assert metrics["policy/mismatch_kl"] > 1e-4  # of the engine and the trainer, with either anchor
        assert torch.equal(seen[-1].rollout_logprobs, part.rollout_logprobs)
        assert seen[-1].rollouts == len(batch.lengths) == seen[-1].rollout.max() + 1
    ratio = (scored - part.rollout_logprobs).exp()
    assert torch.equal(seen[0].old_logprobs, scored)
    assert torch.equal(seen[0].advantages, part.advantages * ratio.clamp(max=2.0))
    assert torch.equal(seen[1].old_logprobs, part.rollout_logprobs)
    assert torch.equal(seen[1].advantages, part.advantages) and metrics["policy/corrected"] == 0


def test_the_entropy_bonus_is_part_of_the_loss_and_raises_the_entropy():
    entropies = {}
    for coef in (0.0, 0.5):
        it = learner(lr=1e-2)
        flat = [dataclasses.replace(e, advantage=0.0) for part in rollouts(it.policy).parts for e in part]
        objective = dataclasses.replace(OBJECTIVE, entropy_coef=coef)
        steps = [it.policy_update(pack(flat, 1000), objective, None, None) for _ in range(5)]
        for step in steps:  # weights of a mean over tokens
            want = step["loss/policy"] - coef * step["policy/entropy"]
            assert step["loss/total"] == pytest.approx(want, abs=1e-6)
        entropies[coef] = steps[-1]["policy/entropy"] - steps[0]["policy/entropy"]
    assert entropies[0.5] > 1e-3 > 10 * abs(entropies[0.0])  # without it, weight decay alone moves


def test_the_kl_penalty_pulls_back_to_the_reference():
    it = learner(lr=1e-2)
    reference = Transformer(MICRO, seed=0).eval().requires_grad_(False)
    batch = rollouts(it.policy)
    it.policy_update(batch, OBJECTIVE, None, None)
    strong = dataclasses.replace(OBJECTIVE, settings=CLIP | {"kl_coef": 100.0})
    first = it.policy_update(batch, strong, None, reference)["loss/kl_ref"]
    for _ in range(5):
        last = it.policy_update(batch, strong, None, reference)["loss/kl_ref"]
    assert 0 < last < first


def test_a_restored_learner_goes_on_to_the_same_bits():
    batches = [supervised(40, sequences(seed=s)) for s in range(4)]
    straight, broken = learner(gamma=0.01), learner(gamma=0.01)
    for batch in batches:
        straight.supervised_update(batch)
    for batch in batches[:2]:
        broken.supervised_update(batch)
    state = torch.load(roundtrip(broken.state_dict()), weights_only=True)
    resumed = learner(gamma=0.01)
    resumed.load_state_dict(state)
    for batch in batches[2:]:
        resumed.supervised_update(batch)
    assert torch.equal(parameters(straight), parameters(resumed))


def roundtrip(value):
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_the_router_bias_moves_towards_an_even_load():
    it = learner(gamma=0.01)
    it.supervised_update(supervised(40, sequences()))
    biases = [b for name, b in it.policy.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases and any(b.abs().max() == pytest.approx(0.01) for b in biases)


def test_schedules():
    cosine = OptimSettings(lr=1.0, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate(cosine, 0, 100) == pytest.approx(0.1)
    assert learning_rate(cosine, 9, 100) == 1.0
    assert learning_rate(cosine, 99, 100) == pytest.approx(0.1)
    assert learning_rate(OptimSettings(lr=2.0), 57, 100) == 2.0
    linear = OptimSettings(lr=1.0, schedule="linear", min_lr_ratio=0.0)
    assert [learning_rate(linear, i, 5) for i in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_the_mtp_weight_falls_at_its_share_of_the_updates():
    net = Transformer(MICRO, seed=0).train()
    late = Learner(net, OptimSettings(lr=1e-9), 4, mtp_coef=0.3, mtp_coef_late=0.1, mtp_late_from=0.5)
    batch = supervised(64, sequences())
    for update in range(4):
        m = late.supervised_update(batch)
        assert m["loss/total"] - m["loss/lm"] == pytest.approx(
            (0.3, 0.3, 0.1, 0.1)[update] * m["loss/mtp"], rel=1e-4
        )


@pytest.mark.parametrize("recompute", [True, False])
def test_recompute_reaches_the_model_or_is_refused(recompute, monkeypatch):
    for policy in (Transformer(MICRO, seed=0), DensePolicy(llama())):
        Learner(policy, OptimSettings(lr=1e-3, recompute=recompute), 1)
        assert policy.recompute is recompute
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"does not support .* --optim\.no-recompute"):
        Learner(DensePolicy(llama()), OptimSettings(lr=1e-3, recompute=True), 1)


def test_a_dense_policy_has_no_experts_to_balance():
    with pytest.raises(UserError, match="this policy has none"):
        Learner(DensePolicy(llama()), OptimSettings(lr=1e-3, balance_alpha=1e-4), 1)


def test_load_metrics_tell_of_each_layer_that_was_trained():
    metrics = load_metrics(torch.tensor([[4.0, 4, 4, 4], [0, 0, 8, 8], [0, 0, 0, 0]]))
    assert metrics == {
        "router/max_violation": 1.0,
        "router/max_violation/0": 0.0,
        "router/max_violation/1": 1.0,
        "router/idle": 0.25,
    }
    assert load_metrics(torch.zeros(0, 4)) == {"router/max_violation": 0.0}


@pytest.mark.parametrize("micro_tokens", [1000, 1])
def test_the_balance_loss_is_a_mean_over_sequences_whatever_the_micro_batches(micro_tokens):
    """Eq. 17 with its weight: part of the loss of SFT and of RL, the same however the batch is cut."""
    texts = sequences()
    net = Transformer(MICRO, seed=0).train()
    net.balance_alpha = 1.0
    alone = []
    for text in texts:
        net.hidden(torch.tensor([text]))
        alone.append(net.pop_balance_loss().item())
    for alpha in (0.0, 0.01):
        optim = OptimSettings(lr=1e-3, router_bias_gamma=0.0, balance_alpha=alpha)
        it = Learner(Transformer(MICRO, seed=0).train(), optim, 10)
        metrics = it.supervised_update(supervised(micro_tokens, texts))
        if alpha:
            want = sum(alone) / len(alone)
            assert metrics["loss/balance"] == pytest.approx(want, rel=1e-4)
            assert metrics["loss/total"] == pytest.approx(metrics["loss/lm"] + alpha * want, rel=1e-5)
            moved = parameters(it)
        else:
            assert "loss/balance" not in metrics
            still = parameters(it)
    assert not torch.equal(moved, still)
