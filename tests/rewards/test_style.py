"""Format, language, repetition and length: tables, and DAPO Eq. 13 read off the page."""

import pytest

from rewards.reward import Scorer
from rewards.style import (
    format_reward,
    in_format,
    language_consistency,
    language_reward,
    repetition,
    soft_overlong,
)
from rollout.types import Problem, Prompt, Rollout


@pytest.mark.parametrize(
    ("completion", "good"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("<think>\n" + "so 7\n</think>\n\n<answer>7</answer>\n", True),  # template's prefill + completion
        ("so 7</think><answer>7</answer>", False),  # prefill forgotten by the caller
        ("<think>\n" + "<think>so</think><answer>7</answer>", False),  # the model repeats the prefill
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think> so <answer>b</answer>", False),
        ("Hi <think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer> bye", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<think>a", False),
        ("", False),
    ],
)
def test_format(completion, good):
    assert in_format(completion) is good
    assert format_reward(Problem("", "math", ""), completion) == float(good)


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("<think>we add them</think><answer>7</answer>", "en", 1.0),
        ("<think>we add them</think><answer>7</answer>", "zh", 0.0),
        ("<think>我们相加</think>", "zh", 1.0),
        ("<think>我们 add them</think>", "zh", 0.5),
        ("<think>我们 add them</think>", "en", 0.5),
        ("设 x 为 $sin(alpha) + beta$，\\frac{ab}{c}", "zh", 2 / 3),  # `ab` is a Latin word, `c` a variable
        ("\\( alpha \\) \\[ beta \\] 好", "zh", 1.0),
        ("x = 3, y_1 = 4cm", "zh", 1.0),  # no words at all
        ("", "en", 1.0),
        ("```python\nwhile running: pass\n``` 好 `foo`", "zh", 1.0),
        ("don't well-known", "en", 1.0),
        ("это не so", "en", 1 / 3),
        ("café", "en", 1.0),
    ],
)
def test_language(text, target, share):
    assert language_consistency(text, target) == pytest.approx(share)


def test_code_answers_say_nothing_about_the_language():
    text = "<think>我们用循环 for while</think><answer>def add(first, second): return first</answer>"
    problem = Problem("", "code", "", language="zh")
    assert language_reward(problem, text) == 1.0
    assert language_consistency(text, "zh") < 0.6


def test_soft_overlong_is_dapo_eq13():
    for length in range(130):
        if length <= 100 - 20:
            want = 0.0
        elif length <= 100:
            want = ((100 - 20) - length) / 20
        else:
            want = -1.0
        assert soft_overlong(length, 100, 20) == want
    assert soft_overlong(100, 100, 0) == 0 and soft_overlong(101, 100, 0) == -1
    with pytest.raises(ValueError, match="buffer_tokens=200"):
        soft_overlong(1, 100, 200)


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
