"""Scores against closed forms, brute force and a hand-worked table."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from pipeline.evaluation.scores import interval, majority, pass_at, rounds, scores, wilson


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c in range(n + 1):
        marks = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(marks, k))
            assert pass_at(k, n, c) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("k, n, c", [(0, 3, 1), (4, 3, 1), (1, 3, 4), (1, 3, -1)])
def test_pass_at_k_refuses_nonsense(k, n, c):
    with pytest.raises(ValueError, match="pass_at"):
        pass_at(k, n, c)


def test_majority_counts_answers_and_shares_ties():
    assert majority([("4", True), ("5", False), ("5", False)]) == 0
    assert majority([("4", True), ("4", True), ("5", False)]) == 1
    assert majority([("4", True), ("5", False)]) == 0.5
    assert majority([("4", True), (None, False), (None, False)]) == 1, "no answer, no vote"
    assert majority([(None, False)]) == 0


def test_majority_counts_values_however_they_are_written():
    thirds = [("\\frac23", True), ("2/3", True), ("\\dfrac{4}{6}", True)]
    assert majority([*thirds, ("3", False), ("3", False)]) == 1
    assert majority([("0.67", False), ("67", False), ("2/3", True)]) == pytest.approx(1 / 3)
    assert majority([("x = 5", True), ("$5$", True), ("6", False), ("6.0", False), ("six", False)]) == 0


def test_majority_is_a_random_pick_among_the_tied():
    rng = random.Random(0)
    for _ in range(50):
        votes = [(a := rng.choice("1234"), a == "1") for _ in range(rng.randint(1, 6))]
        counts = {a: sum(v == a for v, _ in votes) for a, _ in votes}
        tied = [a for a in counts if counts[a] == max(counts.values())]
        assert majority(votes) == pytest.approx(tied.count("1") / len(tied))


@pytest.mark.parametrize("right, n", [(0, 10), (3, 10), (10, 10), (161, 320)])
def test_wilson_bounds_are_where_the_score_test_just_fails(right, n):
    """Wilson's defining property: |p - bound| = z sqrt(bound (1 - bound) / n)."""
    low, high = wilson(right, n)
    p = right / n
    assert 0 <= low <= p <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(p - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


def test_wilson_in_numbers():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # the textbook example
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_interval_says_its_method():
    assert interval([1, 0, 1, 1], 1) == (wilson(3, 4), "wilson")
    (low, high), method = interval([0.25, 0.5, 0.75], 4)
    assert method == "normal" and (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.959964 * 0.25 / math.sqrt(3))
    assert interval([1.0, 1.0], 4) == (wilson(2, 2), "wilson"), "equal means have a width too"
    assert interval([1.0, 0.9], 4)[0][1] == 1.0


def test_the_interval_covers_as_often_as_it_says():
    """95 % intervals of simulated benchmarks with a known accuracy hold it 92 to 98 times in 100."""
    rng = random.Random(0)
    for k in (1, 8):
        held = 0
        for _ in range(600):
            rates = [rng.betavariate(2, 1) for _ in range(80)]  # mean 2/3
            means = [sum(rng.random() < r for _ in range(k)) / k for r in rates]
            low, high = interval(means, k)[0]
            held += low <= 2 / 3 <= high
        assert 0.92 < held / 600 < 0.98, k


def test_rounds_are_the_powers_of_two_and_k():
    assert [rounds(k) for k in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def sample(question: int, right: bool, vote: str | None, *, votes=True, sampled=True, **rest):
    """A row of generations.jsonl, as far as the scores depend on it."""
    tokens, truncated = rest.pop("tokens", 10), rest.pop("truncated", False)
    return {
        "index": question,
        "kind": "math" if votes else "code",
        "extracted": vote or "",
        "verdict": "correct" if right else "incorrect",
        "tokens": tokens,
        "finish_reason": ("length" if truncated else "stop") if sampled else None,
        "parts": {key.removeprefix("in_"): value for key, value in rest.items()},
    }


def test_a_table_worked_by_hand():
    got = scores([
        sample(0, True, "7", in_format=1.0, language=1.0, tokens=10),
        sample(0, True, "7", in_format=1.0, language=0.5, tokens=20),
        sample(0, False, "8", in_format=0.0, language=1.0, tokens=30, truncated=True),
        sample(1, False, "1"),
        sample(1, False, "1"),
        sample(1, True, "2"),
        sample(2, False, None, votes=False, tokens=10) | {"verdict": "error"},
        sample(2, False, None, votes=False),
        sample(2, False, None, votes=False),
        *[sample(3, False, None, sampled=False, tokens=0) for _ in range(3)],
    ])  # fmt: skip
    assert (got["n"], got["k"]) == (4, 3)
    assert got["pass@1"] == pytest.approx((2 / 3 + 1 / 3 + 0 + 0) / 4)
    assert got["pass@2"] == pytest.approx((1 + 2 / 3) / 4)  # of 3 pairs, all 3 and 2 hold a right one
    assert got["pass@3"] == got["pass@k"] == pytest.approx(2 / 4)
    assert got["cons@k"] == pytest.approx(1 / 3), "the code question has no vote; the one too long is lost"
    assert (got["verifier_failures"], got["prompts_too_long"]) == (1, 1)
    assert got["format_rate"] == pytest.approx(2 / 9), "over the 9 that were sampled"
    assert got["language_consistency"] == pytest.approx(8.5 / 9)
    assert got["mean_tokens"] == pytest.approx(120 / 9)
    assert got["truncation_rate"] == pytest.approx(1 / 9)


def test_nothing_sampled_has_no_style():
    got = scores([sample(0, False, None, sampled=False)])
    assert got["pass@1"] == 0 and got["format_rate"] is None and got["mean_tokens"] is None


def test_scores_need_equally_many_samples():
    with pytest.raises(ValueError, match="equally many"):
        scores([sample(0, True, "1"), sample(0, True, "1"), sample(1, True, "1")])
    with pytest.raises(ValueError, match="equally many"):
        scores([])
