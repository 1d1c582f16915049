"""Importance correction: what the engine sampled, weighted as if the trainer's policy had sampled it.

An engine computes other probabilities than the trainer: other kernels, another precision, other experts,
older weights. A loss whose advantages are multiplied by the ratio of both is unbiased again; the bounds keep
its variance finite (`CorrectionSettings`). Over the tokens t of a rollout:

    gap_t    = old_logprobs_t - rollout_logprobs_t
    ratio    = exp gap_t (token)     exp sum gap (sequence)     exp mean gap (geometric)
    weight   = clip(ratio, low, high) (truncate), or ratio inside [low, high] and 0 outside (mask)

A masked token keeps its place in the denominator of the loss, and its KL penalty: only its advantage is 0.

Papers  truncation  Ionides 2008 (truncated importance sampling); TRL 1.16's token_truncate, sequence_truncate
        mask        arXiv:2510.18855 (IcePop, a token's ratio); TRL 1.16's token_mask, sequence_mask
        geometric   arXiv:2507.18071 Eq. 7 (GSPO's ratio of a sequence)
Axes    n scored tokens of a micro-batch, rollouts laid end to end; r rollouts
Units   log-probabilities in nats
"""

from torch import Tensor

from pipeline.settings.rollouts import CorrectionSettings


def over_rollouts(values: Tensor, rollout: Tensor, count: int, *, mean: bool) -> Tensor:
    """Sum or mean of `values` (n) over each of `count` rollouts, on each of its tokens (n).

    In float64, so that neither length nor the order of the sum shows. `rollout` (n) is the token's."""
    wide = values.double()
    sums = wide.new_zeros(count).index_add(0, rollout, wide)
    if mean:
        sums = sums / wide.new_zeros(count).index_add(0, rollout, wide.new_ones(len(wide))).clamp(min=1)
    return sums.index_select(0, rollout).to(values.dtype)


def correction(
    old: Tensor, sampled: Tensor, rollout: Tensor, count: int, settings: CorrectionSettings
) -> tuple[Tensor, Tensor]:
    """Weight of each token's advantage (n), and whether its ratio is outside the bounds (n).

    Of log-probabilities of the old policy and of the engine that `sampled`, and the token's rollout (n)."""
    gap = old - sampled
    if settings.level != "token":
        gap = over_rollouts(gap, rollout, count, mean=settings.level == "geometric")
    ratio = gap.exp()
    outside = (ratio < settings.low) | (ratio > settings.high)
    if settings.treatment == "mask":
        return ratio.masked_fill(outside, 0.0), outside
    return ratio.clamp(settings.low, settings.high), outside
