"""How sure a score is, and whether two differ: 95 % intervals and an exact paired test. Pure functions.

The interval is over questions: a benchmark's questions are a sample of those it could have asked, and more
samples of one question do not average that out (arXiv:2411.00640). One sample a question gives 0 or 1:
Wilson's interval (J. Am. Stat. Assoc. 22, 1927). Means of several samples spread less, those of questions in
families more: Wilson's with the effective number of questions (survey statistics: Korn and Graubard 1998;
Franco et al., J. Surv. Stat. Methodol. 7, 2019, find this form best near 0 and 1, and the variance estimated
too small there). Coverage by simulation: `make bench ARGS=coverage`.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

Z95 = 1.959964
"""The normal distribution's 97.5 % point."""
FEW = 10
"""Fewer questions, or families by their effective number, do not show how much they spread."""
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)
"""Student's t, 97.5 % points for 1 to 8 degrees of freedom."""


def t95(df: float) -> float:
    """Student's t, 97.5 % point: the series in 1/df of Abramowitz and Stegun 26.7.5, right to 1e-4 from 9
    degrees of freedom; fewer, at least 1, are rounded down."""
    if df < 9:
        return T95[int(df) - 1]
    z = Z95
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / df + g2 / df**2 + g3 / df**3 + g4 / df**4


def wilson(right: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share, `right` of `n`; 95 % by default."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z
    centre, spread = p + zz / (2 * n), z * math.sqrt(max(0.0, p * (1 - p)) / n + zz / (4 * n * n))
    low, high = (centre - spread) / (1 + zz / n), (centre + spread) / (1 + zz / n)
    # The bounds hold p; at 0 and n of n they touch it, and rounding must not push them past.
    return max(0.0, min(p, low)), min(1.0, max(p, high))


def families(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[tuple[float, int]]:
    """Sum and number of the values of each family; without `clusters` each value is one."""
    if clusters is None:
        return [(value, 1) for value in values]
    found: dict[Hashable, tuple[float, int]] = {}
    for cluster, value in zip(clusters, values, strict=True):
        total, size = found.get(cluster, (0.0, 0))
        found[cluster] = total + value, size + 1
    return list(found.values())


def variance(groups: Sequence[tuple[float, int]]) -> float:
    """Of the mean of all values, cluster-robust: G / (G - 1) sum_g (total_g - size_g mean)^2 / n^2, infinite
    for one group; for groups of one, the sample variance over n."""
    n, g = sum(size for _, size in groups), len(groups)
    mean = sum(total for total, _ in groups) / n
    return g / (g - 1) * sum((t - s * mean) ** 2 for t, s in groups) / n**2 if g > 1 else math.inf


def effective_number(groups: Sequence[tuple[float, int]]) -> float:
    """n^2 / sum size^2: as many families of one size would be as good as these (Kish's formula)."""
    return float(sum(size for _, size in groups) ** 2 / sum(size**2 for _, size in groups))


def interval(
    means: Sequence[float], samples: int, clusters: Sequence[Hashable] | None = None
) -> tuple[tuple[float, float], str]:
    """95 % interval of the mean of each question's share of right samples, and its method.

    `wilson`: one sample a question, or fewer than 10 questions (n of 0 or 1 each: the widest).
    `wilson-effective`: several samples. `wilson-clustered`: families. `wilson-families`: fewer than 10 of
    them (by effective number), each of which counts as one question. With b = p (1 - p) / m, the variance of
    m independent questions or families, and v, that of `variance`,

        D = w + (1 - w) v / b,   w = exp(-r / 3),   interval = Wilson's of p m / D in m / D,

    r being the rarer of "not all wrong" and "not all right" questions: near 0 and 1, v rests on those few and
    misses what they did not show. v / b is at most 1, and at least half of what chance alone would give. Mean
    coverage over p, simulated: 94 to 96 % for n = 30, 100, 500; from p = 0.01, at single p, above 91 %.

    Args:
        means: share of right samples of each question.
        samples: k, the samples of each.
        clusters: family of each question; questions of different families are independent.
    """
    groups = families(means, clusters)
    n, mean, m = len(means), sum(means) / len(means), effective_number(groups)
    alone = len(groups) == n
    if m < FEW or (samples == 1 and alone):
        return wilson(mean * m, m), "wilson" if alone else "wilson-families"
    binomial = mean * (1 - mean) / m
    ratio = variance(groups) / binomial if binomial > 1e-12 else 1.0
    rare = min(sum(total > 0 for total, _ in groups), sum(total < size for total, size in groups))
    weight = math.exp(-rare / 3)
    d = weight + (1 - weight) * min(1.0, max(ratio, m / (2 * n * samples)))
    z = d * Z95 + (1 - d) * t95(m - 1)  # at d = 1 the variance is the binomial one, and not estimated
    return wilson(mean * m / d, m / d, z), "wilson-effective" if alone else "wilson-clustered"


def difference_interval(
    differences: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, each in -1..1.

    Bonett and Price's adjusted interval (Biometrika 99, 2012), best of the simple ones for pairs of 0 and 1
    (Fagerland et al., Stat. Med. 33, 2014): one more difference of +s and one of -s, then mean and standard
    error. With one sample a question s = 1, as there; with several it is the root mean square of those that
    are not 0. A t quantile, and families as in `variance`.
    """
    groups = families(differences, clusters)
    n, g = len(differences), len(groups)
    values = [total * g / n for total, _ in groups]
    mean = sum(values) / g
    differ = [v * v for v in values if v]
    s2 = sum(differ) / len(differ) if differ else 1.0
    spread = sum(((t - size * mean) * g / n) ** 2 for t, size in groups) + g * mean**2 + 2 * s2
    centre = sum(values) / (g + 2)
    error = math.sqrt(max(0.0, spread / (g + 2) - centre**2) / (g + 2))
    half = t95(max(1.0, effective_number(groups) - 1)) * error
    return max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def sign_flip(differences: Sequence[int]) -> float:
    """Two-sided p-value that paired differences, counts of right samples, have no sign: exact.

    Under the hypothesis that the two models are interchangeable, each question's (or family's) difference
    could as well have had the other sign. The p-value is the share of the 2^n sign patterns whose sum is as
    far from 0: Fisher's randomization test (The Design of Experiments, 1935, Sec. 21), by convolution. With
    one sample a question it is McNemar's exact test, the binomial one on the discordant pairs.
    """
    sizes = [abs(d) for d in differences if d]
    total = sum(sizes)
    chance = np.zeros(2 * total + 1)  # of each sum from -total to total
    chance[total] = 1.0
    for size in sizes:
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    far = abs(np.arange(-total, total + 1)) >= abs(sum(differences))
    return min(1.0, float(chance[far].sum()))
