"""Extraction: a table of completions and what each mode should read out of them."""

import time

import pytest

from rewards.maths.extract import final_answer
from rewards.programs.grade import extract_code

R1 = "<think>\nso {}\n</think>\n<answer>{}</answer>"

# completion, strict, lenient
TABLE = [
    (R1.format("3+4", "7"), "7", "7"),
    (R1.format("3+4", " \\boxed{7} "), "7", "7"),
    (R1.format("3+4", "The answer is $7$."), "The answer is $7$.", "7"),
    (R1.format("\\boxed{9}", "7"), "7", "7"),
    ("so 7</think><answer>7</answer>", "7", "7"),  # the template opened the block
    ("<think>a</think> It is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", "\\frac{1}{2}"),
    ("<think>\\boxed{9}</think> hm, no", None, None),
    ("\\boxed{9}</think> hm, no", None, None),
    ("<think>\\boxed{9}", None, "9"),  # cut off
    ("<think><answer>9</answer>", None, "9"),
    ("<think>a</think><answer></answer>", None, None),
    ("<think>a</think><answer>1</answer><answer>2</answer>", None, "1, 2"),
    ("\\boxed{1} then \\boxed{2}", "2", "2"),
    ("\\boxed{\\boxed{2}}", "2", "2"),
    ("\\boxed{1} and \\boxed{2", "1", "1"),
    ("\\boxed{1} and \\boxed{}", "1", "1"),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}", "\\{1,2\\}"),
    ("\\fbox{3}", "3", "3"),
    ("\\boxed 7", "7", "7"),
    ("5*3=15\n#### 15", None, "15"),
    ("#### Step 1\nThe answer is 15.", None, "15"),
    ("So the answer is 3.5. I hope it is correct.", None, "3.5"),
    ("The final answer is: $\\frac{1}{2}$.", None, "\\frac{1}{2}"),
    ("The answer is 1. No: the answer is 2", None, "2"),
    ("**Answer:** 12", None, "12"),
    ("Answer: \\(x+1\\) because", None, "x+1"),
    ("所以答案是42。", None, "42"),
    ("答案为：$\\sqrt{2}$。", None, "\\sqrt{2}"),
    ("答案：12", None, "12"),
    ("42", None, "42"),
    ("$\\frac{1}{2}$", None, "$\\frac{1}{2}$"),
    ("<think>a</think> \\sqrt{2}", None, "\\sqrt{2}"),
    ("C", None, "C"),
    ("I do not know", None, None),
    ("", None, None),
    ("#### 1\nThe answer is 2", None, "1"),  # the documented order
    ("The answer is 2 \\boxed{3}", "3", "3"),
]


@pytest.mark.parametrize(("completion", "strict", "lenient"), TABLE)
def test_final_answer(completion, strict, lenient):
    assert final_answer(completion, "strict") == strict
    assert final_answer(completion, "lenient") == lenient


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "{", "<think>", "</think>", "<answer>", "$", "#### ", "answer is ", "\\", "\n```", "答案是"],
)
def test_extraction_takes_linear_time(piece):
    start = time.perf_counter()
    for mode in ("strict", "lenient"):
        final_answer(piece * 40_000, mode)
    extract_code(piece * 40_000)
    assert time.perf_counter() - start < 2  # quadratic would take minutes


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("<think>x</think><answer>\n```python\na = 1\n```\n</answer>", "a = 1"),
        ("<think>```python\nb\n```</think><answer>a = 1</answer>", "a = 1"),
        ("```python\na = 0\n```\nbetter:\n```python\na = 1\n```\nruns as\n```\n1\n```", "a = 1"),
        ("```\na = 1\n```", "a = 1"),
        ("```python\na = 1", "a = 1"),
        ("```python\na = 1\n```\n<answer>see above</answer>", "a = 1"),
        ("a = 1", "a = 1"),
        ("<think>x</think>", None),
    ],
)
def test_extract_code(completion, code):
    assert extract_code(completion) == code
