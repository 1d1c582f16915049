"""Arithmetic of an update: fp32 exactly as ever, bf16 and FP8 over fp32 masters, moments in bf16."""

import dataclasses

import pytest
import torch
from test_learner import MICRO, OBJECTIVE, rollouts, roundtrip, sequences, supervised

from model.dense import DensePolicy
from model.scale import fp8
from model.transformer import Transformer
from pipeline.errors import UserError
from pipeline.run.guard import Diverged
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.logprobs import token_logprobs
from pipeline.train.precision import HalfMomentAdamW, memory_order
from tests.small import llama

HALF = ("bfloat16", "fp8")


def learner(precision, **optim):
    settings = {"lr": 1e-3, "router_bias_gamma": 0.0, **optim}
    net = Transformer(MICRO, seed=0).train()
    return Learner(net, OptimSettings(precision=precision, **settings), 10)


def masters(it):
    return torch.cat([p.detach().flatten() for p in it.weights.stepped])


def batches(n=4):
    return [supervised(1000, sequences(seed=seed)) for seed in range(n)]


def test_float32_has_the_bits_of_a_plain_loop_that_knows_no_precisions():
    it = learner("float32")
    net = Transformer(MICRO, seed=0).train()
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for batch in batches():
        it.supervised_update(batch)
        (micro,) = batch.micro_batches()
        states, targets, weights = micro.ahead(1)
        hidden = net.hidden(micro.token_ids, micro.packed)[0, states]
        logprobs, _ = token_logprobs(hidden, net.head, targets, entropy=False)
        (-(weights @ logprobs)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), it.policy.parameters(), strict=True))
    for p, q in zip(it.weights.stepped, it.policy.parameters(), strict=True):
        assert p.data_ptr() == q.data_ptr() and p.is_contiguous()  # no copy: AdamW makes none either
        assert p.grad is None and q.grad is None
    assert not any(isinstance(m, fp8.Fp8Linear | fp8.Fp8Experts) for m in it.policy.modules())
    assert set(it.state_dict()) == {"policy", "adamw", "updates", "early", "guard"}


@pytest.mark.parametrize("precision", HALF)
def test_the_network_is_bf16_over_fp32_masters(precision):
    it = learner(precision)
    reference = learner("float32")
    assert torch.equal(masters(it), masters(reference))
    for batch in batches():
        got, want = it.supervised_update(batch), reference.supervised_update(batch)
        assert got["loss/lm"] == pytest.approx(want["loss/lm"], rel=0.01)
        assert got["loss/lm"] != want["loss/lm"]
    assert {p.dtype for p in it.policy.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in it.weights.stepped} == {torch.float32}
    for p, master in zip(it.policy.parameters(), it.weights.stepped, strict=True):
        assert master.is_contiguous() and torch.equal(p.permute(memory_order(p)), master.bfloat16())
    biases = [b for name, b in it.policy.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases and all(b.dtype == torch.float32 for b in biases)
    converted = any(isinstance(m, fp8.Fp8Linear) for m in it.policy.modules())
    assert converted == (precision == "fp8")


@pytest.mark.parametrize("optim", [{}, {"moments": "bfloat16"}], ids=["fp32 moments", "bf16 moments"])
@pytest.mark.parametrize("precision", ["float32", *HALF])
def test_a_saved_state_has_the_shapes_of_the_network_whatever_its_memory_order(precision, optim):
    """So it does not depend on where weights lie: moments of another order would load without a word."""
    it = learner(precision, **optim)
    it.supervised_update(batches(1)[0])
    state = it.state_dict()
    shapes = [p.shape for p in it.policy.parameters()]
    numbered = [s for s in shapes if len(s) >= 2] + [s for s in shapes if len(s) < 2]
    assert any(p.shape != q.shape for p, q in zip(it.weights.stepped, it.policy.parameters(), strict=True))
    for i, moments in state["adamw"]["state"].items():
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == numbered[i]
    if precision != "float32":
        assert [x.shape for x in state["masters"]] == shapes
        rounded = [x.bfloat16() for x in state["masters"]]
        assert all(map(torch.equal, rounded, it.policy.parameters()))


def test_memory_order():
    x = torch.zeros(2, 3, 4)
    assert memory_order(x) == [0, 1, 2] and memory_order(x.transpose(1, 2)) == [0, 2, 1]
    assert memory_order(torch.zeros(1, 5).T) == [0, 1]  # contiguous, with strides 1 and 5


def test_steps_too_small_for_bf16_add_up_in_the_masters():
    it = learner("bfloat16", lr=1e-6)
    before, rounded = masters(it), [p.detach().clone() for p in it.policy.parameters()]
    for batch in batches(8):
        it.supervised_update(batch)
    moved = (masters(it) - before).abs()
    assert moved.max() < 2e-5 and (moved > 3e-6).float().mean() > 0.2
    still = [torch.equal(p, r) for p, r in zip(it.policy.parameters(), rounded, strict=True)]
    assert any(still)  # norms near 1 cannot show a step of 1e-6


@pytest.mark.parametrize("precision", HALF)
def test_gradients_of_micro_batches_add_up_in_fp32(precision):
    whole, split = learner(precision), learner(precision)
    both = ((whole, 1000), (split, 1))
    norms = [it.supervised_update(supervised(n, sequences()))["optim/grad_norm"] for it, n in both]
    assert norms[1] == pytest.approx(norms[0], rel=0.03)
    assert not any(p.grad is not None for p in split.policy.parameters())


@pytest.mark.parametrize("precision", ["float32", *HALF])
def test_a_restored_learner_goes_on_to_the_same_bits(precision):
    settings = {"precision": precision, "moments": "bfloat16", "router_bias_gamma": 0.01}
    straight, broken, resumed = (learner(**settings) for _ in range(3))
    for batch in batches():
        straight.supervised_update(batch)
    for batch in batches()[:2]:
        broken.supervised_update(batch)
    resumed.load_state_dict(torch.load(roundtrip(broken.state_dict()), weights_only=True))
    moments = [s["exp_avg"].dtype for s in resumed.adamw.state.values()]
    assert moments and set(moments) == {torch.bfloat16}
    for batch in batches()[2:]:
        resumed.supervised_update(batch)
    assert torch.equal(masters(straight), masters(resumed))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            straight.policy.state_dict().values(), resumed.policy.state_dict().values(), strict=True
        )
    )


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["layers.0.self_attn.o_proj.weight", "layers.1.mlp.experts.down_proj"])
def test_what_is_not_finite_inside_the_network_is_counted_and_not_trained_on(precision, bad, where):
    it = learner(precision)
    good = batches(1)[0]
    it.supervised_update(good)
    weight = it.policy.get_parameter(where)
    sound = weight.detach().clone()
    with torch.no_grad():
        weight[..., ::7] = bad
    before = masters(it)
    metrics = it.supervised_update(good)
    assert metrics["optim/skipped"] == 1 and torch.equal(masters(it), before)
    with torch.no_grad():
        weight.copy_(sound)
    assert it.supervised_update(good)["optim/skipped"] == 1  # no further one
    assert not torch.equal(masters(it), before) and masters(it).isfinite().all()
    with torch.no_grad():
        weight[..., ::7] = bad
    with pytest.raises(Diverged, match="not finite"):
        for _ in range(5):
            it.supervised_update(good)


@pytest.mark.parametrize("precision", HALF)
def test_a_policy_update_works_in_every_precision(precision):
    it = learner(precision, lr=1e-2)
    batch = rollouts(it.policy)
    metrics = it.policy_update(batch, OBJECTIVE, None, None)
    assert metrics["optim/skipped"] == 0 and metrics["optim/grad_norm"] > 0
    assert metrics["policy/mismatch_max"] < 0.1  # sampled and trained on in the same arithmetic


def test_a_gpu_without_fp8_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not fp8.supported(torch.device("cuda")) and fp8.supported(torch.device("cpu"))
    monkeypatch.setattr(fp8, "supported", lambda device: False)
    with pytest.raises(UserError, match=r"optim\.precision to bfloat16"):
        learner("fp8")
    learner("bfloat16")


def test_half_moments_step_almost_as_full_ones_do():
    full, half = learner("float32"), learner("float32", moments="bfloat16")
    assert isinstance(half.adamw, HalfMomentAdamW)
    start = masters(full)
    for batch in batches(6):
        full.supervised_update(batch)
        half.supervised_update(batch)
    full_step, half_step = masters(full) - start, masters(half) - start
    assert (half_step - full_step).norm() < 0.02 * full_step.norm()
    assert not torch.equal(half_step, full_step)
    assert {s["exp_avg_sq"].dtype for s in half.adamw.state.values()} == {torch.bfloat16}


def test_adamw_of_one_parameter_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    it = HalfMomentAdamW([{"params": [p], "weight_decay": 0.5}], lr=0.1, betas=(0.5, 0.75))
    value, m, v = 1.0, 0.0, 0.0
    for step, grad in enumerate((2.0, -1.0, 0.5), start=1):  # exact in bf16
        p.grad = torch.tensor([grad])
        it.step()
        m, v = 0.5 * m + 0.5 * grad, 0.75 * v + 0.25 * grad**2
        value *= 1 - 0.1 * 0.5
        value -= 0.1 * (m / (1 - 0.5**step)) / ((v / (1 - 0.75**step)) ** 0.5 + 1e-8)
        assert p.item() == pytest.approx(value, rel=1e-6)


def test_a_second_moment_that_bf16_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"beta2 to 0\.99 or less"):
        OptimSettings(moments="bfloat16", beta2=0.999)
    assert dataclasses.replace(OptimSettings(), moments="bfloat16").beta2 == 0.95


@pytest.mark.parametrize("precision", HALF)
def test_a_dense_policy_trains_in_every_precision(precision):
    policy = DensePolicy(llama(vocab_size=40, tie_word_embeddings=True, initializer_range=0.02)).train()
    it = Learner(policy, OptimSettings(lr=1e-2, precision=precision), 10)
    batch = batches(1)[0]
    losses = [it.supervised_update(batch)["loss/lm"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.05 and it.guard.skipped == 0
    assert policy.head.weight is policy.network.get_input_embeddings().weight
    assert not isinstance(policy.network.lm_head, fp8.Fp8Linear)
    converted = [m for m in policy.modules() if isinstance(m, fp8.Fp8Linear)]
    assert len(converted) == (14 if precision == "fp8" else 0)
    assert {b.dtype for b in policy.buffers() if b.is_floating_point()} == {
        torch.float32
    }  # rotary frequencies
