"""Intervals and the paired test against closed forms, enumeration, scipy and statsmodels, and by simulation.

The constants are scipy 1.17.1's (stats.t, stats.permutation_test over all sign patterns, stats.binomtest) and
statsmodels 0.15.0's (proportion_confint, mcnemar, OLS with clustered covariance), to the digits given.
"""

from __future__ import annotations

import itertools
import math

import pytest

from pipeline.evaluation.intervals import (
    difference_interval,
    effective_number,
    families,
    interval,
    sign_flip,
    t95,
    variance,
    wilson,
)
from tests.bench.coverage import FAMILIES, coverage, paired_coverage


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775327999),
        (5, 10, 0.2365930905, 0.7634069095),
        (161, 320, 0.4486322126, 0.5575436489),
        (29, 30, 0.8332960901, 0.9940914096),
        (1, 500, 0.0003531364, 0.0112407067),
    ],
)
def test_wilson_is_statsmodels(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=2e-8)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (161, 320)])
def test_wilson_bounds_are_where_the_score_test_just_fails(right, n):
    """Wilson's defining property: |p - bound| = z sqrt(bound (1 - bound) / n)."""
    low, high = wilson(right, n)
    p = right / n
    assert 0 <= low <= p <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(p - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("df", "t"),
    [
        *[(1, 12.7062), (2, 4.30265), (5, 2.57058), (8, 2.30600), (8.9, 2.30600), (9, 2.262157)],
        *[(12.5, 2.169186), (29, 2.045230), (99, 1.984217), (499, 1.964729)],
    ],
)
def test_t_is_scipys(df, t):
    assert t95(df) == pytest.approx(t, abs=1e-4)


MEANS = [0.637, 0.27, 0.041, 0.017, 0.813, 0.913, 0.607, 0.729, 0.544, 0.935, 0.816, 0.003, 0.857, 0.034]
OF = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5, 5]


def test_the_variance_of_a_mean_is_clustered_ols_of_a_constant():
    assert variance(families(MEANS, OF)) == pytest.approx(0.010038438567, rel=1e-9)
    mean = sum(MEANS) / 14
    plain = sum((m - mean) ** 2 for m in MEANS) / 13 / 14
    assert (
        variance(families(MEANS, None))
        == pytest.approx(plain)
        == pytest.approx(variance(families(MEANS, range(14))))
    )
    assert effective_number(families(MEANS, OF)) == pytest.approx(14**2 / (9 + 4 + 1 + 16 + 1 + 9))


def test_the_interval_says_its_method():
    marks = [1.0, 0.0, 1.0, 1.0] * 5
    assert interval(marks, 1) == (wilson(15, 20), "wilson")
    assert interval(marks, 1, range(20)) == interval(marks, 1), "families of one are questions"
    assert interval([0.25] * 9, 4)[1] == "wilson", "nine questions do not show their spread"
    assert interval([0.5, 1.0] * 10, 4)[1] == "wilson-effective"
    assert interval(marks, 1, [i // 2 for i in range(20)])[1] == "wilson-clustered"
    few = interval(marks, 1, [i // 5 for i in range(20)])
    assert few == (wilson(3, 4), "wilson-families"), "four families count as four questions"


def test_an_effective_interval_by_hand():
    """20 questions at 1/4 and 20 at 3/4: v = 40 / 39 (1/4)^2 / 40, b = 1/4 / 40, and all 40 are mixed."""
    (low, high), _ = interval([0.25, 0.75] * 20, 4)
    w = math.exp(-40 / 3)
    d = w + (1 - w) * (40 / 39) * (1 / 16) / (1 / 4)
    assert (low, high) == pytest.approx(wilson(20 / d, 40 / d, d * 1.959964 + (1 - d) * 2.022691), abs=1e-6)


def test_near_0_the_few_that_are_not_all_wrong_prove_little():
    """27 questions of 0 and 3 of 1/2: r = 3, v = 30 / 29 x 27 / 40 / 30^2, b = 0.05 x 0.95 / 30."""
    w = math.exp(-1)
    d = w + (1 - w) * (30 / 29 * 0.675 / 900) / (0.05 * 0.95 / 30)
    expected = wilson(1.5 / d, 30 / d, d * 1.959964 + (1 - d) * 2.045230)
    assert interval([0.0] * 27 + [0.5] * 3, 16)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [2, 16])
def test_more_samples_never_widen_and_equal_means_have_a_width(k):
    for share in (0.0, 0.5, 1.0):
        low, high = interval([share] * 30, k)[0]
        assert low <= share <= high and high - low > 0.01
        assert high - low <= 1.05 * (wilson(30 * share, 30)[1] - wilson(30 * share, 30)[0])
    assert interval([0.0] * 30, k)[0] == wilson(0, 30), "no right sample: nothing but n of 0"


@pytest.mark.parametrize("k", [1, 4, 64])
@pytest.mark.parametrize("spread", [0.1, 1.0, math.inf])
def test_mean_coverage_over_p(k, spread):
    """The complete table is that of `make bench ARGS=coverage`; 1,000 simulations know it to 0.7 points."""
    assert 93 < coverage(1, 1000, None, k, [1] * 30, spread, math.inf) < 97.5


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", ["30 of 5", "100 of 1 to 13"])
def test_coverage_of_questions_in_families(name, k):
    assert 92.5 < coverage(2, 800, None, k, FAMILIES[name], 1.0, 1.0) < 98
    if name == "30 of 5":  # taken for 150 questions of their own they would be far too sure
        assert coverage(2, 800, None, k, FAMILIES[name], 0.1, 1.0) > 93


@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("alike", [0.2, 0.8])
def test_coverage_of_a_difference(k, alike):
    assert 92.5 < paired_coverage(3, 800, 60, k, alike) < 98.5


@pytest.mark.parametrize(("lost", "won", "n"), [(3, 9, 40), (0, 7, 20), (25, 25, 100), (0, 0, 15)])
def test_a_difference_of_pairs_is_bonett_and_prices(lost, won, n):
    """Biometrika 99, 2012: p12 = (n12 + 1) / (n + 2) and so on; with t of n - 1 for z."""
    gains = [-1.0] * lost + [1.0] * won + [0.0] * (n - lost - won)
    p12, p21 = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = t95(n - 1) * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    assert difference_interval(gains) == pytest.approx((p12 - p21 - half, p12 - p21 + half), abs=1e-12)


def test_differences_in_families():
    gains = [0.5, 0.5, -0.25, 0.0, 0.25, 0.75] * 5
    assert difference_interval(gains, range(30)) == pytest.approx(difference_interval(gains))
    low, high = difference_interval(gains, [i // 2 for i in range(30)])
    doubled = difference_interval([1.0 / 2, -0.25 / 2, 1.0 / 2] * 5)  # means of the pairs
    assert (low, high) == pytest.approx(doubled)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        *[(0, 0, 1.0), (1, 0, 1.0), (3, 9, 0.14599609375), (10, 2, 0.03857421875)],
        *[(25, 25, 1.0), (0, 7, 0.015625), (40, 61, 0.046044066929)],
    ],
)
def test_with_one_sample_it_is_mcnemars_exact_test(lost, won, p):
    assert sign_flip([-1] * lost + [1] * won + [0] * 20) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize(
    ("gains", "p"),
    [
        ([1, -2, 3, 4, 0, 2, -1, 2], 0.21875),
        ([5, 5, -1, 3, 2, 0, 0, 1, -4, 6], 0.140625),
        ([1] * 6 + [-1] * 2 + [0] * 4, 0.2890625),
        ([7, -3, 2, 9, 11, -6, 4, 4, 4, -1, 8, 3], 0.0419921875),
    ],
)
def test_with_several_it_is_scipys_permutation_test(gains, p):
    assert sign_flip(gains) == pytest.approx(p, abs=1e-12)
    patterns = list(itertools.product((1, -1), repeat=len(gains)))
    sums = [sum(s * g for s, g in zip(signs, gains, strict=True)) for signs in patterns]
    assert sign_flip(gains) == pytest.approx(sum(abs(x) >= abs(sum(gains)) for x in sums) / len(sums))


def test_a_large_comparison_agrees_with_the_normal_law():
    """1,319 questions: the exact p-value and that of the normal law of the sum, sd = sqrt(sum d^2)."""
    gains = [(i * 7) % 11 - 5 + (i % 40 == 0) * 3 for i in range(1319)]
    z = abs(sum(gains)) / math.sqrt(sum(g * g for g in gains))
    assert sign_flip(gains) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)
