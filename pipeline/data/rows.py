"""Rows of the known data sets as problems, whatever their keys are called."""

from __future__ import annotations

from typing import Any, cast

from pipeline.data.jsonl import JsonObject
from pipeline.errors import UserError
from rewards.maths.extract import last_boxed
from rollout.types import Kind, Language, Problem, StdioTest


def first(row: JsonObject, *keys: str) -> Any:
    """The value of the first key that the row has and fills."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)


def to_problem(row: JsonObject, where: str, source: str, index: int) -> Problem:
    """A row of any of the known shapes as a problem.

    Args:
        row: JSON object.
        where: file and line, for errors.
        source: what the problem's `source` and id fall back to.
        index: the row's number, for its id.

    Raises:
        UserError: no question, or neither answer nor tests.
    """
    question = first(row, "question", "problem", "prompt", "text")
    if not isinstance(question, str):
        raise UserError(f"{where}: no question; expected a key question, problem or prompt with text")
    name = first(row, "id", "unique_id", "task_id", "ID")
    identity = str(name) if isinstance(name, str) else f"{source}/{index if name is None else name}"
    tests = code_tests(row, where)
    answer = "" if tests else gold_answer(row, where)
    kind = choice(row, "kind", ("math", "general", "code"), where) or "math"
    return Problem(
        id=identity,
        kind="code" if tests else cast(Kind, kind),
        question=code_question(row, question) if tests else question,
        answer=answer,
        tests=tests,
        source=str(row.get("source") or source),
        language=cast(Language, choice(row, "language", ("en", "zh"), where) or "en"),
    )


def choice(row: JsonObject, key: str, allowed: tuple[str, ...], where: str) -> str | None:
    """The row's value of an optional key that has few values."""
    value = row.get(key)
    if value is not None and value not in allowed:
        raise UserError(f"{where}: {key} {value!r} must be one of {', '.join(allowed)}")
    return cast("str | None", value)


def code_tests(row: JsonObject, where: str) -> tuple[str | StdioTest, ...]:
    """Tests of a code problem: HumanEval, MBPP, stdin/stdout cases, or our own statements; else none."""
    if "entry_point" in row and isinstance(row.get("test"), str):  # HumanEval: one statement that checks all
        return (f"{row['test']}\ncheck({row['entry_point']})",)
    if row.get("test_list"):  # MBPP
        setup = row.get("test_setup_code") or ""
        return (*([setup] if setup.strip() else []), *map(str, row["test_list"]))
    tests = row.get("tests")
    if not tests:
        if row.get("kind") == "code":
            raise UserError(f"{where}: a code problem without tests")
        return ()
    if not isinstance(tests, list):
        raise UserError(f"{where}: tests must be a list, not {type(tests).__name__}")
    found: list[str | StdioTest] = []
    for test in tests:
        if isinstance(test, str):
            found.append(test)
        elif isinstance(test, dict) and {"input", "output"} <= test.keys():
            found.append(StdioTest(str(test["input"]), str(test["output"])))
        else:
            raise UserError(f"{where}: a test is a Python statement or an object with input and output")
    return tuple(found)


def code_question(row: JsonObject, question: str) -> str:
    """The question that the model sees: what to write; for MBPP the tests, which name the function."""
    if "entry_point" in row and isinstance(row.get("test"), str):
        return (
            "Complete this Python function. Answer with the whole function and its imports in one "
            f"```python block.\n\n```python\n{question.rstrip()}\n```"
        )
    if row.get("test_list"):
        tests = "\n".join(map(str, row["test_list"]))
        return f"{question}\n\nAnswer with one ```python block. It should pass these tests:\n\n{tests}"
    if isinstance(first(row, "tests"), list) and isinstance(row["tests"][0], dict):
        return f"{question}\n\nAnswer with one ```python block: a program that reads stdin and writes stdout."
    return question


def gold_answer(row: JsonObject, where: str) -> str:
    """The row's answer as text: after GSM8K's `####`, or boxed in a solution where there is none."""
    value = first(row, "answer", "final_answer")
    if isinstance(value, list):  # OlympiadBench
        value = ", ".join(map(str, value))
    if value is not None:
        text = str(value).strip()
        return text.rpartition("####")[2].strip().replace(",", "") if "\n####" in text else text
    solution = first(row, "solution", "response")
    if isinstance(solution, str):
        found = last_boxed(solution)
        if found is None and "####" in solution:
            found = solution.rpartition("####")[2].strip().replace(",", "")
        if found:
            return found
    raise UserError(f"{where}: no answer; expected a key answer, a solution that boxes one, or tests")
