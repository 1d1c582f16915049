"""Log-probabilities in chunks against float64 and the whole softmax."""

import pytest
import torch
from torch import nn

from pipeline.train import logprobs as module
from pipeline.train.logprobs import token_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_the_whole_softmax_in_float64(monkeypatch, temperature):
    torch.manual_seed(0)
    head, hidden, targets = (
        nn.Linear(8, 50, bias=False),
        torch.randn(33, 8, requires_grad=True),
        torch.randint(50, (33,)),
    )
    dense = torch.log_softmax(hidden.double() @ head.weight.double().T / temperature, -1)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 50 * 7)  # seven rows a chunk, a ragged last one
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
    monkeypatch.setattr(module, "CPU_ROWS", 7)
    for mine, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
