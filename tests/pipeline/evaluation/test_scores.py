"""Scores against closed forms, brute force and a hand-worked table."""

from __future__ import annotations

import itertools

import pytest

from pipeline.evaluation.scores import majority, pass_at, rounds, scores


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


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_majority_is_a_random_pick_among_the_tied_for_every_pattern_of_votes(k):
    """All votes of k samples for 1 (right), 2, 3 or nothing; the mean over all orders of breaking a tie."""
    for answers in itertools.product(("1", "2", "3", None), repeat=k):
        picks = []
        for order in itertools.permutations("123"):  # of candidates: the first with most votes wins
            most = max(order, key=answers.count)
            picks.append(most == "1" and answers.count(most) > 0)
        assert majority([(a, a == "1") for a in answers]) == pytest.approx(sum(picks) / len(picks)), answers


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


def test_families_of_questions_widen_the_interval_and_the_standard_error():
    alone = [sample(i, i % 12 < 6, "1") for i in range(72)]
    together = [row | {"labels": {"family": f"f{row['index'] // 6}"}} for row in alone]
    free, tied = scores(alone), scores(together)
    assert (free["interval_method"], tied["interval_method"]) == ("wilson", "wilson-clustered")
    assert free["stderr"] == pytest.approx((0.25 / 71) ** 0.5)
    assert tied["stderr"] == pytest.approx((0.25 / 11) ** 0.5)
    assert tied["interval"][0] < free["interval"][0] < 0.5 < free["interval"][1] < tied["interval"][1]
    assert scores([row | {"labels": {}} for row in alone]) == free
    assert scores([sample(0, True, "1")])["stderr"] is None


def test_scores_need_equally_many_samples():
    with pytest.raises(ValueError, match="equally many"):
        scores([sample(0, True, "1"), sample(0, True, "1"), sample(1, True, "1")])
    with pytest.raises(ValueError, match="equally many"):
        scores([])
