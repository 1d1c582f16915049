"""Answers and completions made to hang, crash or fool the grader: each is answered in time, none is correct."""  # noqa: E501

from __future__ import annotations

import json
import time

import pytest

from pipeline.tools.grade import grade_file
from rewards.maths.extract import final_answer
from rewards.maths.grade import grade_math
from rewards.pool import TaskFailed, WorkerPool
from tests.rewards.in_time import outcomes_in_time

LIMIT_S = 2.0
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


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        assert (
            grade_math("\\log_2 8", "\\log_3 27", pool=pool).value == 1
        )  # started: a start has a clock of its own
        yield pool


@pytest.mark.parametrize(
    ("name", "gold"), [(name, "\\sqrt{7}") for name in [*EXPENSIVE, *ODD]] + [(name, "7") for name in ODD]
)
def test_answered_in_time_and_never_correct(pool, name, gold):
    answer = {**EXPENSIVE, **ODD}[name]
    for outcome in outcomes_in_time(lambda: grade_math(gold, answer, pool=pool, timeout_s=LIMIT_S), LIMIT_S):
        assert outcome.value != 1, outcome.detail
        assert outcome.detail


def test_the_pool_works_on_after_it(pool):
    assert grade_math("\\sqrt{50}", "5 \\cdot \\sqrt{2}", pool=pool).value == 1


def test_an_expensive_answer_is_wrong_and_an_expensive_gold_an_error(pool):
    """An answer must not buy itself out; a gold that cannot be checked is the verifier's failure."""
    tower = "2 + 9^{9^{9^{9^{9}}}}"
    wrong = grade_math("\\sqrt{7}", tower, pool=pool, timeout_s=LIMIT_S)
    assert wrong.value == 0 and "too expensive" in wrong.detail
    failed = grade_math(tower, "\\sqrt{7}", pool=pool, timeout_s=LIMIT_S)
    assert failed.value is None


@pytest.mark.parametrize(
    ("failure", "value"),
    [
        (TaskFailed("time ran out", "time", "answer", cpu_s=1.9), 0.0),
        (TaskFailed("time ran out", "time", "answer", cpu_s=0.1), None),  # the machine was busy
        (TaskFailed("time ran out", "time", "gold", cpu_s=1.9), None),
        (TaskFailed("memory ran out", "memory", "answer"), 0.0),
        (TaskFailed("memory ran out", "memory", "gold"), None),
        (TaskFailed("died", "died", "answer"), None),
    ],
)
def test_who_is_to_blame(failure, value):
    class Failing:
        def call(self, task, timeout_s):
            raise failure

    salted = f"\\log_2 {id(failure)}"  # needs the engine; nothing remembered from another case
    assert grade_math(salted, "\\log_3 11", pool=Failing(), timeout_s=LIMIT_S).value == value  # type: ignore[arg-type]


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
