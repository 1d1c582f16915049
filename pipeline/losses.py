"""Losses on packed rows: log-probabilities in chunks, and the clipped policy gradient.

`policy_loss` serves GRPO, DAPO and Dr. GRPO alike. Those differ in how much each token counts, and
`pipeline.pack.rollout_weights` settles that once, when a batch is packed. Weights are shares of the
global batch, so micro-batches simply add up.

Papers  GRPO  arXiv:2402.03300  Eq. 3 (objective), Eq. 4 (KL estimator)
        DAPO  arXiv:2503.14476  Eq. 8 (token-level mean, asymmetric clip)
        TIS   truncated importance sampling between engine and trainer, as in verl and TRL
Axes    n scored tokens of a micro-batch; d hidden size; v vocabulary
Units   log-probabilities, entropy and KL in nats
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20
"""Most bytes of fp32 logits alive at once."""


def token_logprobs(
    hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy there, without the whole logits ever existing.

    Args:
        hidden: `n d`, final-normed states at the positions before the targets.
        head: output projection, `d -> v`.
        targets: `n`, token ids.
        temperature: that of the sampling distribution; logits are divided by it.
        entropy: whether to compute it; zeros otherwise.

    Returns:
        `n` log-probabilities with gradient; `n` entropies without.
    """
    rows = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    if hidden.shape[0] <= rows:
        return _score(hidden, head.weight, targets, temperature, entropy)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    scored = [
        checkpoint(_score, h, head.weight, t, temperature, entropy, use_reentrant=False) for h, t in chunks
    ]
    return torch.cat([s[0] for s in scored]), torch.cat([s[1] for s in scored])


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float()
    logprobs = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
    if not entropy:
        return chosen, torch.zeros_like(chosen, requires_grad=False)
    with torch.no_grad():
        return chosen, -(logprobs.exp() * logprobs).sum(-1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate less a KL penalty, negated for a minimizer (GRPO Eq. 3).

        rho  = exp(logprobs - old_logprobs)
        k3   = exp(ref - logprobs) - (ref - logprobs) - 1                             (Eq. 4)
        loss = -sum w (min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef k3)

    Args:
        logprobs: `n`, current policy; the only input that carries gradient.
        old_logprobs: `n`, the policy that sampled, as the trainer (not the engine) scores it.
        ref_logprobs: `n`, frozen reference policy; pass `logprobs.detach()` when there is none.
        advantages: `n`, a rollout's advantage repeated over its tokens.
        weights: `n`, each token's share of the loss.

    Returns:
        Scalar loss; metrics that, like the loss, add up over micro-batches.
    """
    rho = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    kl = k3(logprobs, ref_logprobs)
    loss = -(weights * (surrogate - kl_coef * kl)).sum()
    with torch.no_grad():
        clipped = (surrogate < rho * advantages).to(weights)
        return loss, {"loss/clip_frac": weights @ clipped, "loss/kl_ref": weights @ kl}


def k3(p: Tensor, q: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(p || q) a token, from log-probabilities of tokens drawn from `p`."""
    gap = q - p
    return gap.expm1() - gap  # expm1: the gaps are tiny, and a KL estimate is never negative
