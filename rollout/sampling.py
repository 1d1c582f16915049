"""Sample one token a row from logits, reproducibly, with its log-probability.

One uniform number a token goes through the inverse of the cumulative distribution. The numbers come
from a counter-based generator keyed by (seed, prompt, sample), so a rollout is the same whatever it is
batched with and whichever process samples it.

Axes    b rows, v vocabulary
Units   log-probabilities in nats, under the distribution that was sampled from: temperature-scaled,
        truncated, renormalized. Greedy choices have the log-probability of the raw logits.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout.types import SamplingParams

MASK64 = (1 << 64) - 1


def uniform_stream(seed: int, index: int, sample: int, n: int) -> NDArray[np.float32]:
    """The first `n` uniforms in [0, 1) of a rollout; a longer stream starts with a shorter one.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) takes seed, prompt and sample
    as its key, so streams neither overlap nor depend on the order in which they are made."""
    key = np.array([seed & MASK64, (index << 32 | sample) & MASK64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(n, dtype=np.float32)


def truncate(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """`scaled` (b v) with -inf outside the k likeliest tokens, then outside the nucleus of mass `top_p`.

    The nucleus is the smallest set of likeliest tokens whose mass reaches `top_p` (arXiv:1904.09751,
    Sec. 3.1), here of the distribution after top-k. Ties go to the lower id."""
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1:
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the likelier tokens; short of top_p, this one is needed
        before[:, 0] = 0.0
        ordered.masked_fill_(before >= top_p, -torch.inf)
    return torch.empty_like(scaled).scatter_(1, ids, ordered)


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row.

    Args:
        logits: `b v`, any float type; the arithmetic is fp32.
        uniforms: `b`, in [0, 1), fp32; not read when greedy.
        params: temperature, top_p and top_k count.

    Returns:
        Token ids `b` (int64) and their log-probabilities `b` (fp32).
    """
    logits = logits.float()
    if params.temperature == 0:
        best, token = logits.max(-1)
        return token, best - logits.logsumexp(-1)
    # Divide only where it changes something: this is the hot path of RL, at temperature 1.
    scaled = logits if params.temperature == 1 else logits / params.temperature
    if params.top_k or params.top_p < 1:
        scaled = truncate(scaled, params.top_k, params.top_p)
    scaled = scaled - scaled.amax(-1, keepdim=True)
    mass = scaled.exp().cumsum(-1)  # b v, not normalized: the last column is the sum
    total = mass[:, -1:]
    # The first token whose cumulative mass exceeds u * total: never one of probability 0, since u < 1.
    token = torch.searchsorted(mass, uniforms.unsqueeze(1) * total, right=True)
    logprob = scaled.gather(1, token) - total.log()
    return token.squeeze(1), logprob.squeeze(1)


def refuse_nonfinite(logits: Tensor, where: Callable[[int], tuple[int, int, int]]) -> None:
    """Raise `FloatingPointError` for the first row of `logits` (b v) that has a NaN or an infinity.

    `where` maps a row to its decode step, prompt and sample."""
    sound = logits.sum(-1).isfinite()  # one pass; finite logits are far too small for their sum to overflow
    if not sound.all():
        row = int((~sound).nonzero()[0])
        step, prompt, number = where(row)
        raise FloatingPointError(
            f"logits are NaN or infinite at decode step {step}, row {row} (prompt {prompt}, sample {number});"
            " the weights have diverged: lower the learning rate or go back to an earlier checkpoint."
        )
