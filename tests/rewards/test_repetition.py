"""Repetition counts what is said again, and nothing that every solution repeats."""

import pytest

from rewards.reward import Scorer
from rewards.style import repetition
from rollout.types import Problem, Prompt, Rollout


def test_a_loop_is_nearly_all_repetition_and_a_solution_is_none():
    assert repetition("Wait, let me check that again from the start. " * 50) > 0.9
    assert repetition("再检查一遍这个算式到底对不对。" * 30) > 0.9
    assert repetition("First 3+4-5. Then 7-5. So the result is 2. The answer is 2.") == 0.0
    assert repetition("") == repetition("one two") == 0.0


def test_it_is_the_share_of_ngrams_seen_before():
    assert repetition("a b c d a b c d", n=2) == pytest.approx(3 / 7)  # ab bc cd da ab bc cd
    assert repetition("1 1 1 1", n=1) == 0.75


def test_it_is_linear_in_length():
    assert repetition("x1+ " * 200_000) > 0.99


def test_the_scorer_subtracts_it_by_its_weight():
    problem = Problem("p", "math", "2+2=?", "4", (), "own", "en")
    rollout = Rollout(Prompt(problem, "r1", (1,)), 0, 0, (2,), (0.0,), "stop", 0)
    text = (
        "<think>" + "so it must be four because two and two are four. " * 20 + "</think>\n<answer>4</answer>"
    )
    with Scorer({"accuracy": 1.0}) as plain, Scorer({"accuracy": 1.0, "repetition": 0.5}) as strict:
        kept, cut = plain.grade(rollout, text), strict.grade(rollout, text)
    assert kept.reward == 1.0 and kept.parts["repetition"] == cut.parts["repetition"] < -0.8
    assert cut.reward == pytest.approx(1.0 + 0.5 * cut.parts["repetition"])
