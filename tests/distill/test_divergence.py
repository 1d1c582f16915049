"""The divergences against loops over floats, their gradients against finite differences and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill import divergence as module
from distill.divergence import Divergence, weighted_divergence
from model.policy import Head

N, V, D, E = 7, 13, 5, 3
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
HEADS = {
    "plain": {},
    "scaled, with bias": {"bias": True, "scale": 0.25},
    "capped": {"softcap": 2.0, "scale": 1.5},
}


def head(width: int, rows: int, seed: int, *, bias: bool = False, **more: float) -> Head:
    torch.manual_seed(seed)
    weight = torch.randn(rows, width, dtype=torch.double)
    return Head(weight, torch.randn(rows, dtype=torch.double) if bias else None, **more)


def problem(student: str = "plain", teacher: str = "plain", rows: int = V):
    """Student's states and head, teacher's, targets, weights."""
    torch.manual_seed(0)
    hidden, taught = torch.randn(N, D, dtype=torch.double), 2 * torch.randn(N, E, dtype=torch.double)
    targets, weights = torch.randint(V, (N,)), torch.rand(N, dtype=torch.double)
    return (
        hidden,
        head(D, V, 1, **HEADS[student]),
        taught,
        head(E, rows, 2, **HEADS[teacher]),
        targets,
        weights,
    )


def probabilities(state: list[float], of: Head, rows: int, temperature: float) -> list[float]:
    logits = []
    for v in range(rows):
        z = sum(w * h for w, h in zip(of.weight[v].tolist(), state, strict=True))
        z = of.scale * (z + (of.bias[v].item() if of.bias is not None else 0.0))
        z = z if of.softcap is None else of.softcap * math.tanh(z / of.softcap)
        logits.append(z / temperature)
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def looped(kind: str, beta: float, temperature: float, hidden, own, taught, teacher, targets, weights):
    """GKD's Sec. 2 read off the page: floats and loops. P is the teacher, Q the student."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))

    total, logprobs, entropies = 0.0, [], []
    for i in range(len(hidden)):
        q = probabilities(hidden[i].tolist(), own, V, temperature)
        p = probabilities(taught[i].tolist(), teacher, V, temperature)
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        value = {
            "reverse_kl": kl(q, p),
            "forward_kl": kl(p, q),
            "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        }[kind]
        total += weights[i].item() * value
        logprobs.append(math.log(q[targets[i]]))
        entropies.append(-sum(x * math.log(x) for x in q))
    return total, logprobs, entropies


@pytest.fixture(params=[3, 100], ids=lambda rows: f"{rows} rows a chunk")
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CPU_ROWS", request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("student", "teacher"), [(a, b) for a in HEADS for b in HEADS])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_values_equal_a_float64_loop(chunk, kind, beta, student, teacher, temperature):
    of = problem(student, teacher, rows=V + 2)  # two rows of padding in the teacher's head
    got = weighted_divergence(Divergence(kind, beta, temperature), *of)
    for mine, theirs in zip(got, looped(kind, beta, temperature, *of), strict=True):
        torch.testing.assert_close(mine, torch.tensor(theirs, dtype=torch.double), rtol=1e-12, atol=1e-14)


def naive(
    kind: str, beta: float, temperature: float, hidden, own, taught, teacher, targets, weights
) -> Tensor:
    """All logits at once, for autograd; `Head.__call__` has no chunk."""
    q = (own(hidden) / temperature).softmax(1)
    p = (teacher(taught) / temperature).softmax(1)
    m = beta * p + (1 - beta) * q
    kl = lambda a, b: (a * (a / b).log()).sum(1)  # noqa: E731
    value = {"reverse_kl": kl(q, p), "forward_kl": kl(p, q), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}
    return weights @ value[kind]


@pytest.mark.parametrize("student", ["plain", "capped"])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_gradients_equal_autograd_through_all_logits(chunk, kind, beta, student):
    hidden, own, taught, teacher, targets, weights = problem(student, "scaled, with bias")
    own = own._replace(bias=torch.randn(V, dtype=torch.double))
    leaves = [x.requires_grad_() for x in (hidden, own.weight, own.bias)]
    rest = (taught, teacher, targets, weights)
    got = torch.autograd.grad(
        3 * weighted_divergence(Divergence(kind, beta, 0.7), hidden, own, *rest)[0], leaves
    )
    want = torch.autograd.grad(3 * naive(kind, beta, 0.7, hidden, own, *rest), leaves)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("student", HEADS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_gradients_equal_finite_differences(kind, beta, student):
    hidden, own, taught, teacher, targets, weights = problem(student)
    rest, of = (taught, teacher, targets, weights), Divergence(kind, beta, 1.3)
    leaves = [x.requires_grad_() for x in (hidden, own.weight)]
    assert torch.autograd.gradcheck(
        lambda h, w: weighted_divergence(of, h, own._replace(weight=w), *rest)[0], leaves, atol=1e-7
    )


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_student_like_its_teacher_has_nothing_to_learn(kind, beta):
    hidden, own, _, _, targets, weights = problem()
    hidden.requires_grad_()
    loss, *_ = weighted_divergence(
        Divergence(kind, beta, 1.0), hidden, own, hidden.detach(), own, targets, weights
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(loss.item()) < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_certain_models_that_disagree_give_finite_numbers(kind, beta):
    """Probabilities that fp32 cannot hold: exp(-200) is 0 there, its logarithm must not be used."""
    eye, hidden = Head(200 * torch.eye(4)), torch.eye(4).requires_grad_()
    taught, weights = torch.eye(4).roll(1, 0), torch.full((4,), 0.25)
    loss, *_ = weighted_divergence(
        Divergence(kind, beta, 1.0), hidden, eye, taught, eye, torch.arange(4), weights
    )
    loss.backward()
    assert hidden.grad.isfinite().all()
    most = 200.0 if kind != "jsd" else -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert loss.item() == pytest.approx(most, rel=1e-5)


def test_bf16_weights_and_states_work_in_fp32():
    hidden, own, taught, teacher, targets, weights = problem()
    half = lambda x: x.to(torch.bfloat16)  # noqa: E731
    own, teacher = (of._replace(weight=half(of.weight)) for of in (own, teacher))
    hidden, own = half(hidden).requires_grad_(), own._replace(weight=own.weight.requires_grad_())
    of = (hidden, own, half(taught), teacher, targets, weights.float())
    loss, *_ = weighted_divergence(Divergence("reverse_kl", 0.5, 1.0), *of)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == own.weight.grad.dtype == torch.bfloat16
    exact = looped("reverse_kl", 0.5, 1.0, *of)[0]
    assert loss.item() == pytest.approx(exact, rel=0.03)
