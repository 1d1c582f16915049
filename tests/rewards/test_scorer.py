"""The weighted sum, the three outcomes, and many rollouts at once."""

import pytest

from rewards.reward import Scorer
from rollout.types import Problem, Prompt, Rollout

MATH = Problem("m", "math", "3+4?", answer="7")
BROKEN = Problem("b", "math", "?", answer="\\frac{")
CODE = Problem("c", "code", "f", tests=("assert f(1) == 2", "assert f(2) == 9"))
GENERAL = Problem("g", "general", "capital?", answer="Paris")


def rollout(problem: Problem) -> Rollout:
    return Rollout(Prompt(problem, "r1_zero", ()), 0, 0, (), (), "stop")


def r1(answer: str) -> str:
    return f"<think>\nwe add 加\n</think>\n<answer>{answer}</answer>"


def test_sum_and_parts():
    with Scorer({"accuracy": 1.0, "format": 0.5, "language": 3.0}) as scorer:
        graded = scorer.grade(rollout(MATH), r1("7"))
        assert graded.verdict == "correct"
        assert graded.parts == pytest.approx(
            {"accuracy": 1.0, "format": 1.0, "language": 2 / 3, "repetition": 0.0}
        )
        assert graded.reward == pytest.approx(1 + 0.5 + 2)
        wrong = scorer.grade(rollout(MATH), r1("8"))
        assert wrong.verdict == "incorrect" and wrong.reward == pytest.approx(2.5)
        assert scorer.grade(rollout(MATH), "7").verdict == "incorrect"  # strict: no tags, no box
        assert scorer.grade(rollout(GENERAL), r1(" paris. ")).verdict == "correct"


def test_a_failed_verifier_is_an_error_and_has_no_part():
    with Scorer({"accuracy": 1.0}) as scorer:
        graded = scorer.grade(rollout(BROKEN), r1("7"))
        assert graded.verdict == "error"
        assert "accuracy" not in graded.parts and "format" in graded.parts
        assert "does not parse" in graded.detail


def test_partial_credit_is_not_correct():
    program = r1("def f(x): return x + 1")
    with Scorer({"accuracy": 1.0}, partial_credit=True) as scorer:
        graded = scorer.grade(rollout(CODE), program)
        assert graded.reward == 0.5 and graded.verdict == "incorrect"
    with Scorer({"accuracy": 1.0}) as scorer:
        assert scorer.grade(rollout(CODE), program).reward == 0


def test_grade_all_keeps_the_order_and_agrees_with_grade():
    root = Problem("s", "math", "?", answer="2\\sqrt{2}")
    pairs = [
        (rollout(problem), r1(text))
        for i in range(8)
        for problem, text in [
            (MATH, str(i)),
            (root, f"\\sqrt{{{i}}}"),
            (CODE, f"f = lambda x: x + {i}"),
            (BROKEN, "1"),
        ]
    ]
    with Scorer({"accuracy": 1.0, "format": 0.1}, mode="lenient") as scorer:
        together = scorer.grade_all(iter(pairs))
        assert together == [scorer.grade(*pair) for pair in pairs]
    assert [graded.rollout is pair[0] for graded, pair in zip(together, pairs, strict=True)] == [True] * len(
        pairs
    )
    assert together[7 * 4].verdict == "correct"
