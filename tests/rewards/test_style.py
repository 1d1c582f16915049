"""Format, language and length: tables, and DAPO Eq. 13 read off the page."""

import pytest

from rewards.style import format_reward, in_format, language_consistency, language_reward, soft_overlong
from rollout.types import Problem


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
