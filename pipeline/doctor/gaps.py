"""What separates the engine's log-probabilities from the trainer's, and which cause has that signature.

For a token of probability p, u = logit(p of the trainer) - logit(p of the engine) is about the difference of
its logits, whatever p is; its distribution tells the causes apart. Bounds lie between what 60 cases of seven
tiny models showed (bf16, FP8, other experts, temperatures, prompts, older weights), three of them for tests:

    temperature   u is a line in the engine's logit (R^2 0.98 and more; other causes at most 0.4)
    template      u is largest at a completion's first token (12 to 140 times the median of the later ones;
                  older weights: at most 6)
    routes        most tokens hardly differ and some much: 10 % or more exceed 8 medians (12 to 24 %;
                  rounding: at most 7 %)
    precision     small and symmetric: a median below 0.2 (bf16 0.02, FP8 0.07 to 0.15)
    stale_weights all else (older weights: a median of 1 to 2), and a gap that begins with the updates
"""

import numpy as np
from numpy.typing import NDArray

PRESENT = 1e-6
"""Nats a token of KL from which there is a gap: fp32 has 1e-13, bf16 1e-6 to 1e-3."""
UNCERTAIN = 1e-3
"""Tokens that both sides give more than 1 - this tell nothing."""
SMALL = 0.2
"""Median difference of a logit up to which it may be rounding."""
UNENDED = 0.5
"""Share of the completions that stopped without their end token from which it is lost; in a sound run 0."""
LEAST = 30
"""Uncertain tokens that a signature takes."""
Floats = NDArray[np.float64]


def logit(logprobs: Floats) -> Floats:
    """ln(p / (1 - p)) of log-probabilities; of a certain token that of 1 - 1e-7, about fp32's last."""
    return logprobs - np.log(-np.expm1(np.minimum(logprobs, -1e-7)))


def signature(engine: Floats, trainer: Floats, starts: NDArray[np.int64], gains: Floats) -> dict[str, float]:
    """What tells the causes apart, by the names of metrics; empty without a gap.

    Args:
        engine, trainer: log-probabilities of all completion tokens, rollouts laid end to end.
        starts: index of each rollout's first token.
        gains: each rollout's advantage; zeros where it is not known.
    """
    gap = trainer - engine
    kl = float((np.expm1(gap) - gap).mean()) if len(gap) else 0.0
    uncertain = np.minimum(engine, trainer) < -UNCERTAIN
    if not kl > PRESENT or uncertain.sum() < LEAST:
        return {}
    x, moved = logit(engine)[uncertain], (logit(trainer) - logit(engine))[uncertain]
    size = np.abs(moved)
    spaces = size, np.abs(gap[uncertain])  # noise of either is no heavy tail of the other
    median = float(np.median(size))
    first = np.isin(np.flatnonzero(uncertain), starts)
    slope, fit = max(line(x, moved), line(engine[uncertain], gap[uncertain]), key=lambda found: found[1])
    later = float(np.median(size[~first])) if not first.all() else median
    counted = gains != 0
    return {
        "gap/kl": kl,
        "gap/median": median,
        "gap/tail": min(float((of > 8 * np.median(of)).mean()) for of in spaces),
        "gap/extreme": min(float(np.quantile(of, 0.99) / max(np.median(of), 1e-9)) for of in spaces),
        "gap/bias": float(moved.mean()) / float(moved.std() + abs(moved.mean()) + 1e-30),
        "gap/slope": slope,
        "gap/fit": fit,
        "gap/first": float(np.median(size[first])) / max(later, 1e-9) if first.sum() >= 8 else 1.0,
        "gap/aligned": rank_correlation(np.add.reduceat(gap, starts)[counted], gains[counted]),
    }


def line(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and R^2 of y = slope * x; R^2 0 where a constant does nearly as well."""
    slope = float(x @ y) / max(float(x @ x), 1e-30)
    left = float(((y - slope * x) ** 2).sum())
    return slope, 1 - left / max(float(y @ y), 1e-30) if 2 * left < float(y.var()) * len(y) else 0.0


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's, of at least 100 pairs; 0 of fewer, which say little."""
    if len(x) < 100:
        return 0.0
    return float(np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1])


def causes(found: dict[str, float], *, template: bool, updates_began_it: bool = False) -> list[str]:
    """The kinds of a `signature`, the likeliest first; none of an empty one. Rounding moves some routes, so
    the two may come together.

    Args:
        template: whether that may be claimed, which takes the model's own words.
        updates_began_it: there was no gap before the first update.
    """
    if not found:
        return []
    median, tail = found["gap/median"], found["gap/tail"]
    if found["gap/fit"] >= 0.9 and abs(found["gap/slope"]) >= 0.01:
        return ["temperature"]
    if template and found["gap/first"] >= 10 and found["gap/first"] * median >= 1:
        return ["template"]
    if updates_began_it or found["gap/aligned"] >= 0.35:  # updates raise what had an advantage
        return ["stale_weights"]
    if median < SMALL and (tail >= 0.1 or (tail >= 0.005 and found["gap/extreme"] > 40)):
        return ["routes"] if tail >= 0.1 or median < 0.012 else ["precision", "routes"]
    return ["precision"] if median < SMALL and abs(found["gap/bias"]) < 0.4 else ["stale_weights"]


def evidence(found: dict[str, float]) -> str:
    """A signature in one line."""
    shares = f"{found['gap/tail']:.0%} over 8 medians, {found['gap/first']:.1f} medians at the first token"
    line = f"R^2 {found['gap/fit']:.2f} of a line in the log-probability (slope {found['gap/slope']:+.2f})"
    with_gains = f"rank correlation with the advantage {found['gap/aligned']:+.2f}"
    what = f"median difference of a logit {found['gap/median']:.2g}, {shares}; {line}; {with_gains}"
    return f"KL {found['gap/kl']:.2g} nats a token; {what}"
