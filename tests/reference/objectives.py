"""Policy objectives and corrections read off the papers' pages: floats and loops, no code of the product.

A rollout is `(advantage, tokens)`, a token `(new, old, engine, ref)`: log-probabilities in nats of the
policy, of the old policy as the trainer scores it and as the engine reported it, and of the reference.
Results are to be maximized.
"""

import math

SEQUENCE_TO_MEAN = 32
"""The constant of Dr. GRPO's mean, tokens."""


def clip(x, low, high):
    return min(max(x, low), high)


def corrections(tokens, level, treatment, low, high, anchor):
    """Importance weight of each token of a rollout."""
    if anchor == "engine":
        return [1.0] * len(tokens)
    gaps = [old - engine for _, old, engine, _ in tokens]
    if level == "sequence":
        gaps = [sum(gaps)] * len(gaps)
    elif level == "geometric":
        gaps = [sum(gaps) / len(gaps)] * len(gaps)
    ratios = [math.exp(gap) for gap in gaps]
    if treatment == "truncate":
        return [clip(ratio, low, high) for ratio in ratios]
    return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]


def ppo(ratio, advantage, low, high, dual=0.0):
    """GRPO Eq. 3 and DAPO Eq. 8; with the bound of Dual-Clip PPO, Eq. 5."""
    value = min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)
    return max(value, dual * advantage) if dual and advantage < 0 else value


def per_token(loss, advantage, tokens, held, low, high, dual):
    """Surrogate of each token; `held` are the current log-probabilities where they have no gradient."""
    if loss == "gspo":  # Eq. 7: (pi / pi_old) to the power of 1 / length
        length = len(tokens)
        ratio = math.prod(math.exp(new - old) for new, old, _, _ in tokens) ** (1 / length)
        return [ppo(ratio, advantage, low, high)] * length
    if loss == "cispo":  # Eq. 4 and 5
        weights = [
            clip(math.exp(h - old), 1 - low, 1 + high) for h, (_, old, _, _) in zip(held, tokens, strict=True)
        ]
        return [w * advantage * new for w, (new, _, _, _) in zip(weights, tokens, strict=True)]
    return [ppo(math.exp(new - old), advantage, low, high, dual) for new, old, _, _ in tokens]


def kl_of(token, estimator):
    """GRPO Eq. 4; DeepSeek-V3.2 Eq. 7."""
    new, old, _, ref = token
    k3 = math.exp(ref) / math.exp(new) - math.log(math.exp(ref) / math.exp(new)) - 1
    return k3 if estimator == "k3" else math.exp(new) / math.exp(old) * k3


def objective(loss, rollouts, held, correction, *, low, high, dual, beta, estimator):
    """The objective of a batch. `held`: the values of `new`, a list a rollout, see `per_token`."""
    sums, lengths = [], []
    for (advantage, tokens), fixed in zip(rollouts, held, strict=True):
        weights = corrections(tokens, *correction)
        if correction[-1] == "engine":
            tokens = [(new, engine, engine, ref) for new, _, engine, ref in tokens]
        surrogates = per_token(loss, advantage, tokens, fixed, low, high, dual)
        terms = [
            w * s - beta * kl_of(t, estimator) for w, s, t in zip(weights, surrogates, tokens, strict=True)
        ]
        sums.append(math.fsum(terms))
        lengths.append(len(terms))
    if loss in ("grpo", "gspo"):
        return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    if loss in ("dapo", "cispo"):
        return sum(sums) / sum(lengths)
    return sum(sums) / (len(sums) * SEQUENCE_TO_MEAN)
