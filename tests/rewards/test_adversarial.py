"""Answers and completions made to hang, crash or fool the grader: each is answered in time, none is correct."""  # noqa: E501

from __future__ import annotations

import json
import time

import pytest

from pipeline.tools.grade import grade_file
from rewards.maths.extract import final_answer
from rewards.maths.grade import grade_math
from tests.rewards.in_time import outcomes_in_time

LIMIT_S = 1.0
EXPENSIVE = {
    "power tower": "9^{9^{9^{9^{9}}}}",
    "power": "123456789^{123456789}",
    "factorials": "((9!)!)!",
    "deep fractions": "\\frac{1}{1+" * 150 + "x" + "}" * 150,
    "deep roots": "\\sqrt{" * 200 + "2" + "}" * 200,
    "expansion": "(x+y+z+1)^{4000}",
    "nested exponents": "x^{" * 150 + "2" + "}" * 150,
    "integral": "\\int_0^1 \\frac{\\sin(x^x)}{x^{\\pi}+e^{x^2}} dx",
    "sum": "\\sum_{k=1}^{10^{12}} \\frac{1}{k^k}",
    "many digits": "1" * 1900 + " \\cdot \\sqrt{2}",
    "brackets": "(" * 900 + "\\pi" + ")" * 900,
    "absolutes": "|" * 200 + "x" + "|" * 200,
    "plus minus": "\\pm" * 20 + "\\sqrt{2}",
    "list of lists": "(" + "(1,2)," * 200 + "\\sqrt{2})",
}
ODD = {
    "long": "5" * 100_000,
    "long prose": "word " * 20_000,
    "unbalanced": "{" * 5000 + "5",
    "boxes": "\\boxed{" * 5000,
    "NUL": "5\x006",
    "surrogate": "\ud800\udc00\ud800",
    "injection": "__import__('os').system('touch /tmp/r1-injected')",
    "injection, sympy": "\\operatorname{exec}(\"open('/tmp/r1-injected','w')\")",
    "lambda": "(lambda f: f(f))(lambda f: f(f))",
    "right to left": "\u202e5",
    "nothing": "\\text{}",
    "everything": "\\mathbb{R}",
    "all values": "x \\in \\mathbb{R}",
    "any": "x",
    "self": "gold",
    "correct": "correct",
    "true": "True",
    "nan": "nan",
    "zoo": "\\frac{7}{0}",
    "hedge": "7 or 8",
    "hedge, list": ", ".join(map(str, range(50))),
    "interval around": "[0, 10]",
    "inequality": "x \\ge 7",
    "tolerance": "7 \\pm 1",
}


REPEATED = [
    "\\boxed{", "{", "(", "[", "|", "\\left(", "\\frac", "\\frac{1}{", "\\sqrt", "\\sin", "^", "2^", "_",
    "x_", "!", "'", "%", "\\pm", "\\cup", "1,", "1, ", ", ", "=", "x=", "<", "1<", " and ", " or ", ":",
    "1:", "a ", "cm ", "cm/", "square ", "\\text{", "\\ ", "\\\\", "&", "\\begin{pmatrix}", "-", "--1",
    "1e9", "9", "9 ", "9.", "\\overline{", "the answer is ", "minus ", "(1,2),", "\\{1,", "A) ", "x \\in ",
    "\\mid ", "\\circ", "th", "\u2460", "twenty-", "\\pi!", "e^", "x^2+", "\\log_2", "\\arctan ",
    "n \\in \\mathbb{Z} ",
]  # fmt: skip


@pytest.mark.parametrize(
    "gold", ["\\sqrt{7}", "7", "(1, 2)", "x^2 + 1", "[1, \\infty)", "5 \\text{ cm}", "even", "x = 4"]
)
def test_answered_in_time_and_never_correct(gold):
    """Grading runs in the trainer's process, where nothing can be killed: so no answer may take long."""
    repeated = [(piece * 2000)[:1990] for piece in REPEATED]
    ends = [text[:-1] + end for text in repeated for end in ("7", "}", ")")]
    for answer in (*EXPENSIVE.values(), *ODD.values(), *repeated, *ends):
        for outcome in outcomes_in_time(lambda answer=answer: grade_math(gold, answer), LIMIT_S):
            assert outcome.value != 1, (answer[:80], outcome.detail)
            assert outcome.detail


def test_an_expensive_answer_is_wrong_and_an_expensive_gold_an_error():
    """An answer must not buy itself out; a gold that cannot be checked is the verifier's failure."""
    tower = "2 + 9^{9^{9^{9^{9}}}}"
    wrong = grade_math("\\sqrt{7}", tower)
    assert wrong.value == 0 and "too expensive" in wrong.detail
    assert grade_math(tower, "\\sqrt{7}").value is None


@pytest.mark.parametrize("piece", ["\\boxed{", "{", "}", "$", "\\[", "answer is ", "Answer:\n", "#### 5 ", "**",  # noqa: E501
                                   "5 and ", "<answer>", "</answer>", "\n\nQ: ", "\x00", "\ud800", "= ", "\\\\"])  # fmt: skip  # noqa: E501
def test_extraction_is_linear(piece):
    """Ten times the text in about ten times the time: a quadratic pattern would take a hundred."""

    def seconds(repeats: int) -> float:
        best = 10.0
        for _ in range(3):
            start = time.process_time()
            final_answer("So " + piece * repeats + " 5.", "lenient")
            best = min(best, time.process_time() - start)
        return best

    small, large = seconds(2_000), seconds(20_000)
    assert large < 40 * max(small, 2e-3)


def test_grade_streams_a_large_batch_in_order(tmp_path):
    """8,192 lines, adversarial ones among them, with no more than a window of them in memory at once."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    odd = list(ODD.values())
    with source.open("w") as file:
        for i in range(8192):
            text = odd[i // 97 % len(odd)] if i % 97 == 0 else f"so \\boxed{{{i}}}"
            file.write(
                json.dumps({"id": i, "answer": "7" if i % 97 == 0 else str(i), "completion": text}) + "\n"
            )
    counts = grade_file(source, out)
    rows = [json.loads(line) for line in out.open()]
    assert [row["id"] for row in rows] == list(range(8192))
    assert all(row["verdict"] == "correct" for row in rows if row["id"] % 97)
    assert counts["correct"] == 8192 - len(range(0, 8192, 97))
