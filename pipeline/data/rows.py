"""Rows of the known data sets as problems, whatever their keys are called."""

from typing import Any, cast

from pipeline.data.jsonl import JsonObject
from pipeline.errors import UserError
from rewards.maths.extract import last_boxed
from rollout.types import Kind, Language, Problem, StdioTest


def first(row: JsonObject, *keys: str) -> Any:
    """The value of the first key that the row has and fills."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)


def to_problem(row: JsonObject, where: str, source: str, index: int) -> Problem:
    """A row of any known shape as a problem. Without an id, `source` and `index` make one.

    Raises:
        UserError: no question, or neither answer nor tests.
    """
    question = first(row, "question", "problem", "prompt", "text")
    if isinstance(question, list) and isinstance(question[-1], dict):  # verl's: a list of turns
        question = question[-1].get("content")
    if not isinstance(question, str):
        raise UserError(f"{where}: no question; expected a key question, problem or prompt with text")
    name = first(row, "id", "unique_id", "task_id", "ID")
    identity = name if isinstance(name, str) else f"{source}/{index if name is None else name}"
    question, tests = code_problem(row, question, where)
    answer = "" if tests else gold_answer(row, where)
    kind = choice(row, "kind", ("math", "general", "code"), where) or "math"
    language = cast(Language, choice(row, "language", ("en", "zh"), where) or "en")
    kind = "code" if tests else cast(Kind, kind)
    return Problem(identity, kind, question, answer, tests, str(row.get("source") or source), language)


def choice(row: JsonObject, key: str, allowed: tuple[str, ...], where: str) -> str | None:
    """The row's value of an optional key that has few values."""
    value = row.get(key)
    if value is not None and value not in allowed:
        raise UserError(f"{where}: {key} {value!r} must be one of {', '.join(allowed)}")
    return cast("str | None", value)


def code_problem(row: JsonObject, question: str, where: str) -> tuple[str, tuple[str | StdioTest, ...]]:
    """A code problem's question as the model sees it, and its tests; of others the question, and no tests.

    The shapes are HumanEval's, MBPP's, stdin/stdout cases, and our own statements.
    """
    if "entry_point" in row and isinstance(row.get("test"), str):  # HumanEval: one statement that checks all
        task = "Complete this Python function. Answer with the whole function and its imports in one"
        question = f"{task} ```python block.\n\n```python\n{question.rstrip()}\n```"
        return question, (f"{row['test']}\ncheck({row['entry_point']})",)
    if row.get("test_list"):  # MBPP: the tests name the function
        setup, listed = row.get("test_setup_code") or "", [str(test) for test in row["test_list"]]
        task = "Answer with one ```python block. It should pass these tests:"
        return "\n".join([question, "", task, "", *listed]), (*([setup] if setup.strip() else []), *listed)
    tests = row.get("tests") or []
    if not tests and row.get("kind") == "code":
        raise UserError(f"{where}: a code problem without tests")
    if not isinstance(tests, list):
        raise UserError(f"{where}: tests must be a list, not {type(tests).__name__}")
    if not all(
        isinstance(t, str) or (isinstance(t, dict) and {"input", "output"} <= t.keys()) for t in tests
    ):
        raise UserError(f"{where}: a test is a Python statement or an object with input and output")
    if tests and isinstance(tests[0], dict):
        question += "\n\nAnswer with one ```python block: a program that reads stdin and writes stdout."
    return question, tuple(
        t if isinstance(t, str) else StdioTest(str(t["input"]), str(t["output"])) for t in tests
    )


def gold_answer(row: JsonObject, where: str) -> str:
    """The row's answer as text: after GSM8K's `####`, or boxed in a solution where there is none."""
    value = first(row, "answer", "final_answer")
    if value is None and isinstance(row.get("reward_model"), dict):  # verl's
        value = row["reward_model"].get("ground_truth")
    if isinstance(value, list):  # OlympiadBench
        value = ", ".join(map(str, value))
    if value is not None:
        text = str(value).strip()
        return after_hashes(text) if "\n####" in text else text
    solution = first(row, "solution", "response")
    if isinstance(solution, str):
        found = last_boxed(solution)
        found = after_hashes(solution) if found is None and "####" in solution else found
        if found:
            return found
    raise UserError(f"{where}: no answer; expected a key answer, a solution that boxes one, or tests")


def after_hashes(text: str) -> str:
    """GSM8K's answer: what follows `####`, without thousands separators."""
    return text.rpartition("####")[2].strip().replace(",", "")
