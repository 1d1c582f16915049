"""Log-probabilities in chunks against float64 and the whole softmax."""

import pytest
import torch

from model.policy import Head
from pipeline.train import logprobs as module
from pipeline.train.logprobs import token_logprobs


def random_head(v=50, d=8, bias=False, **how):
    """A head of v tokens over states of d."""
    torch.manual_seed(0)
    weight, b = torch.randn(v, d, requires_grad=True), torch.randn(v, requires_grad=True) if bias else None
    return Head(weight, b, **how)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "soft cap": {"softcap": 3.0},
    "all of them": {"bias": True, "scale": 0.5, "softcap": 2.0},
}


@pytest.mark.parametrize("bonus", [0.0, 1.0], ids=["log-probabilities", "entropies too"])
@pytest.mark.parametrize("chunk", [7, 64], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_equal_the_whole_softmax_in_float64(
    monkeypatch, kind, temperature, chunk, bonus
):
    """Of the logits as the head's equation has them, written out. 7 rows a chunk leave a ragged last one."""
    head = random_head(**HEADS[kind])
    hidden, targets = torch.randn(33, 8, requires_grad=True), torch.randint(50, (33,))
    upstream, onto_entropy = torch.randn(33), bonus * torch.randn(33)
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * 50 * chunk})
    logprobs, entropy = token_logprobs(hidden, head, targets, temperature, entropy_gradient=bool(bonus))
    assert entropy.requires_grad == bool(bonus)

    inputs = [x for x in (hidden, head.weight, head.bias) if x is not None]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    z = head.scale * (wide[0] @ wide[1].T + (wide[2] if len(wide) > 2 else 0))
    z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
    dense = torch.log_softmax(z / temperature, -1)
    want = dense.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), want, atol=2e-6, rtol=0)
    spread = -(dense.exp() * dense).sum(1)
    torch.testing.assert_close(entropy.double(), spread, atol=1e-5, rtol=0)
    for mine, theirs in zip(
        torch.autograd.grad(upstream @ logprobs + onto_entropy @ entropy, inputs),
        torch.autograd.grad(upstream.double() @ want + onto_entropy.double() @ spread, wide),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


def test_what_the_softmax_rounds_to_zero_has_its_log_probability_and_gradient():
    """Targets from certain to e^-400 away: fp32 has no probability below e^-103."""
    logits = torch.tensor([[0.0, -40.0, -80.0, -95.0, -150.0, -400.0]]).repeat(6, 1)
    targets, head = torch.arange(6), Head(torch.eye(6))
    hidden = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, head, targets)
    dense = logits.double().log_softmax(1)
    torch.testing.assert_close(logprobs.double(), dense.diagonal(), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(dense.exp() * dense).sum(1), atol=1e-6, rtol=0)
    (got,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(got, (torch.eye(6) - dense.exp()).float(), atol=1e-6, rtol=0)
    _, entropy = token_logprobs(hidden, head, targets, entropy_gradient=True)
    assert torch.autograd.grad(entropy.sum(), hidden)[0].isfinite().all()  # 0 log 0 is 0


def test_large_logits_lose_no_digits_of_their_differences():
    """A difference of two sums would be off by the rounding of 1,000, 3e-5."""
    logits = torch.tensor([[1000.0, 999.0, 998.5]])
    logprobs, _ = token_logprobs(logits, Head(torch.eye(3)), torch.tensor([1]))
    torch.testing.assert_close(logprobs.double(), logits.double().log_softmax(1)[:, 1], atol=2e-7, rtol=0)


def test_logits_that_are_not_finite_are_not_taken_for_small_ones():
    hidden = torch.randn(2, 3)
    hidden[1, 0] = float("nan")
    logprobs, _ = token_logprobs(hidden, Head(torch.randn(3, 3)), torch.tensor([0, 1]))
    assert logprobs[0].isfinite() and logprobs[1].isnan()


@pytest.mark.parametrize("kind", HEADS)
def test_chunks_that_are_kept_for_the_backward_change_nothing(monkeypatch, kind):
    head, targets = random_head(**HEADS[kind]), torch.randint(50, (33,))
    hidden, upstream = torch.randn(33, 8, requires_grad=True), torch.randn(33)

    def gradients():
        logprobs, entropy = token_logprobs(hidden, head, targets, 0.7)
        # The second backward finds what was kept used up.
        inputs = [x for x in (hidden, head.weight, head.bias) if x is not None]
        twice = [torch.autograd.grad(logprobs, inputs, upstream, retain_graph=True) for _ in "ab"]
        for first, second in zip(*twice, strict=True):
            torch.testing.assert_close(first, second)
        return [logprobs, entropy, *twice[0]]

    whole = gradients()
    monkeypatch.setattr(module, "CPU_ROWS", 7)
    for mine, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_bf16_states_have_fp32_log_probabilities_and_gradients_of_their_type():
    head = random_head()
    states = torch.randn(33, 8).bfloat16().requires_grad_()
    small = Head(head.weight.detach().bfloat16().requires_grad_())
    logprobs, entropy = token_logprobs(states, small, torch.randint(50, (33,)))
    want = (states.float() @ small.weight.float().T).log_softmax(-1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1), atol=0.05, rtol=0)
    assert [x.dtype for x in torch.autograd.grad(logprobs.sum(), (states, small.weight))] == [
        torch.bfloat16
    ] * 2
