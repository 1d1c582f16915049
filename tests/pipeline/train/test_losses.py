"""The policy loss and the log-probabilities against loops, floats and float64."""

import math

import pytest
import torch
from torch import nn

from pipeline.train import losses
from pipeline.train.advantages import group_advantages
from pipeline.train.losses import k3, policy_loss, token_logprobs
from pipeline.train.pack import rollout_weights


def clipped_objective(rollouts, low, high, beta):
    """GRPO Eq. 3 and 4 read off the page: mean over rollouts of the mean over tokens."""
    total = 0.0
    for advantage, tokens in rollouts:
        value = 0.0
        for new, old, ref in tokens:
            rho = math.exp(new - old)
            clipped = min(max(rho, 1 - low), 1 + high)
            kl = math.exp(ref - new) - (ref - new) - 1
            value += min(rho * advantage, clipped * advantage) - beta * kl
        total += value / len(tokens)
    return total / len(rollouts)


@pytest.mark.parametrize("lengths", [[1], [3, 3], [1, 7, 2, 40]])
@pytest.mark.parametrize("high", [0.2, 10.0])
def test_policy_loss_is_the_papers_objective_negated(lengths, high):
    torch.manual_seed(0)
    advantages = torch.randn(len(lengths), dtype=torch.double)
    new, old, ref = -3 * torch.rand(3, sum(lengths), dtype=torch.double)  # ratios reach e^3: both clips bite
    lens = torch.tensor(lengths)
    weights = torch.tensor(rollout_weights(lengths, "grpo", 64), dtype=torch.double).repeat_interleave(lens)
    got, metrics = policy_loss(
        new, old, ref, advantages.repeat_interleave(lens), weights, clip_low=0.2, clip_high=high, kl_coef=0.04
    )
    rows = torch.stack([new, old, ref], 1).split(lengths)
    rollouts = list(zip(advantages.tolist(), [r.tolist() for r in rows], strict=True))
    assert got.item() == pytest.approx(-clipped_objective(rollouts, 0.2, high, 0.04), rel=1e-12)
    assert 0 <= metrics["loss/clip_frac"] <= 1


def test_the_gradient_is_that_of_the_objective():
    torch.manual_seed(1)
    new = (-torch.rand(12, dtype=torch.double)).requires_grad_()
    old, ref, advantages = (
        -torch.rand(12, dtype=torch.double),
        -torch.rand(12, dtype=torch.double),
        torch.randn(12).double(),
    )
    weights = torch.full((12,), 1 / 12, dtype=torch.double)

    def loss(x):
        return policy_loss(x, old, ref, advantages, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.01)[0]

    assert torch.autograd.gradcheck(loss, new)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_rollout_weights_are_each_papers_mean(kind):
    lengths, values = [2, 5, 1], [[1.0, 2.0], [3.0] * 5, [7.0]]
    weights = rollout_weights(lengths, kind, max_tokens=10)
    got = sum(w * sum(v) for w, v in zip(weights, values, strict=True))
    want = {"grpo": (1.5 + 3 + 7) / 3, "dapo": (3 + 15 + 7) / 8, "dr_grpo": (3 + 15 + 7) / 30}[kind]
    assert got == pytest.approx(want)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_the_whole_softmax_in_float64(monkeypatch, temperature):
    torch.manual_seed(0)
    head, hidden, targets = (
        nn.Linear(8, 50, bias=False),
        torch.randn(33, 8, requires_grad=True),
        torch.randint(50, (33,)),
    )
    dense = torch.log_softmax(hidden.double() @ head.weight.double().T / temperature, -1)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 50 * 7)  # seven rows a chunk, a ragged last one
    logprobs, entropy = token_logprobs(hidden, head, targets, temperature)
    torch.testing.assert_close(logprobs.double(), dense.gather(1, targets[:, None])[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy.double(), -(dense.exp() * dense).sum(1), atol=1e-5, rtol=0)
    (want,) = torch.autograd.grad(dense.gather(1, targets[:, None]).sum(), hidden)
    (got,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_what_the_softmax_rounds_to_zero_has_its_log_probability_and_gradient():
    """Targets from certain to e^-400 away: fp32 has no probability below e^-103."""
    logits = torch.tensor([[0.0, -40.0, -80.0, -95.0, -150.0, -400.0]]).repeat(6, 1)
    targets, head = torch.arange(6), nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(6))
    hidden = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, head, targets)
    dense = logits.double().log_softmax(1)
    torch.testing.assert_close(logprobs.double(), dense.diagonal(), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(dense.exp() * dense).sum(1), atol=1e-6, rtol=0)
    (got,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(got, (torch.eye(6) - dense.exp()).float(), atol=1e-6, rtol=0)


def test_logits_that_are_not_finite_are_not_taken_for_small_ones():
    head, hidden = nn.Linear(3, 3, bias=False), torch.randn(2, 3)
    hidden[1, 0] = float("nan")
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([0, 1]))
    assert logprobs[0].isfinite() and logprobs[1].isnan()


def test_chunks_that_are_kept_for_the_backward_change_nothing(monkeypatch):
    torch.manual_seed(0)
    head, targets = nn.Linear(8, 50, bias=False), torch.randint(50, (33,))
    hidden, upstream = torch.randn(33, 8, requires_grad=True), torch.randn(33)

    def gradients():
        logprobs, entropy = token_logprobs(hidden, head, targets, 0.7)
        # The second backward finds what was kept used up.
        twice = [
            torch.autograd.grad(logprobs, (hidden, head.weight), upstream, retain_graph=True) for _ in "ab"
        ]
        for first, second in zip(*twice, strict=True):
            torch.testing.assert_close(first, second)
        return [logprobs, entropy, *twice[0]]

    whole = gradients()
    monkeypatch.setattr(losses, "CPU_ROWS", 7)
    for mine, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_k3_is_unbiased():
    """Its mean over the policy is the KL divergence itself, summed exactly over a small vocabulary."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 9, dtype=torch.double).log_softmax(-1)
    assert (p.exp() * k3(p, q)).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-12)


def test_advantages_by_hand():
    assert group_advantages([1.0, 0.0, 0.0, 1.0], "std") == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "none") == [0.75, -0.25, -0.25, -0.25]


def test_a_failed_verifier_has_no_say():
    assert group_advantages([1.0, None, 0.0], "none") == [0.5, None, -0.5]
    assert group_advantages([None, None], "std") == [None, None]
    assert group_advantages([0.3, 0.3, None], "std") == [0.0, 0.0, None]
