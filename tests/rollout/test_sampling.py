"""Samples against closed-form distributions, worked out in plain Python from the definition."""

import math

import numpy as np
import pytest
import torch

from rollout.sampling import sample, uniform_stream
from rollout.types import SamplingParams

LOGITS = [2.0, -1.0, 0.5, 0.5, 3.0, -4.0, 1.0, 0.0, -0.5, 2.5]


def distribution(logits, temperature, top_k, top_p):
    """Probabilities by definition: scale, cut to k, renormalize, cut to the nucleus, renormalize."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[:top_k] if top_k else order
    mass = {i: math.exp(logits[i] / temperature) for i in order}
    total, kept, covered = sum(mass.values()), {}, 0.0
    for i in order:
        if covered >= top_p and kept:
            break
        kept[i] = mass[i]
        covered += mass[i] / total
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))]


SETTINGS = [
    (1.0, 0, 1.0), (0.6, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.8), (0.6, 0, 0.95),
    (1.5, 6, 0.7), (1.0, 1, 1.0), (1.0, 0, 1e-6), (1.0, 50, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square over 20,000 samples; the bound is the 0.9999 quantile by Wilson and Hilferty's formula."""
    n = 20_000
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    uniforms = torch.from_numpy(uniform_stream(7, 0, 0, n))
    tokens, logprobs = sample(torch.tensor(LOGITS).expand(n, -1), uniforms, params)
    want = distribution(LOGITS, temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    assert all(count == 0 for count, p in zip(counts, want, strict=True) if p == 0)
    terms = [(count - n * p) ** 2 / (n * p) for count, p in zip(counts, want, strict=True) if p > 0]
    freedom = len(terms) - 1
    if freedom:
        bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
        assert sum(terms) < bound
    for token, logprob in zip(tokens[:200].tolist(), logprobs[:200].tolist(), strict=True):
        assert logprob == pytest.approx(math.log(want[token]), abs=2e-6)


def test_greedy_takes_the_best_with_its_raw_logprob():
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    tokens, logprobs = sample(logits, torch.tensor([0.99, 0.0]), SamplingParams(max_tokens=1, temperature=0))
    assert tokens.tolist() == [4, 5]
    assert logprobs[0].item() == pytest.approx(3.0 - math.log(sum(map(math.exp, LOGITS))), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_uniforms_never_sample_the_impossible(dtype):
    """u = 0 with an impossible first token, u just under 1 with impossible last ones."""
    logits = torch.full((2, 50), -1e4, dtype=dtype)
    logits[:, 10:40] = torch.linspace(-3, 3, 30).to(dtype)
    tokens, logprobs = sample(logits, torch.tensor([0.0, 1 - 2**-24]), SamplingParams(max_tokens=1))
    assert tokens.tolist() == [10, 39]
    assert logprobs.isfinite().all()


def test_inputs_are_left_alone():
    logits = torch.tensor([LOGITS, LOGITS])
    sample(logits, torch.tensor([0.3, 0.6]), SamplingParams(max_tokens=1, top_k=2, top_p=0.5))
    assert logits.tolist() == torch.tensor([LOGITS, LOGITS]).tolist()


def test_streams_are_uniform_apart_and_keyed():
    uniforms = uniform_stream(3, 5, 2, 4000)
    assert uniforms.dtype == np.float32 and uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.02 and abs(uniforms.var() - 1 / 12) < 0.01
    assert np.array_equal(uniform_stream(3, 5, 2, 10), uniforms[:10])
    keys = [(3, 5, 2), (4, 5, 2), (3, 6, 2), (3, 5, 3), (3, 2, 5), (-3, 5, 2), (0, 0, 0), (2**63, 0, 1)]
    assert len({uniform_stream(*key, 4).tobytes() for key in keys}) == len(keys)
