"""What public data sets call things: a table of the shapes that rows have, each with an example.

A row is read by the first shape of `SHAPES` all of whose keys it has. Keys are compared in lower case, an
empty value counts as none, and `--fields` names the keys of any other shape. All shapes share how a question
is found (text, or the turns of a conversation) and how the tests of a program may be written.
"""

import base64
import builtins
import json
import pickletools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.data.jsonl import BadRow, JsonObject
from rewards.maths.extract import last_boxed
from rewards.programs.helpers import preamble
from rollout.types import StdioTest

Tests = tuple[str | StdioTest, ...]
MOST_BYTES = 1 << 30
"""Of compressed tests, unpacked."""
BLOCK = "Answer with one ```python block"
STDIO = f"{BLOCK}: a program that reads stdin and writes stdout."
QUESTIONS = (
    *("question", "problem", "prompt", "text", "instruction", "query", "description", "question_content"),
    *("problem_description", "messages", "conversations"),
)
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth_answer", "gold", "ground_truth")
CASES = ("input_output", "tests", "test_cases", "official_tests", "test")
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asks, and what checks the answer: a gold, or tests, the first `shown` of which it shows."""

    question: str
    answer: str = ""
    tests: Tests = ()
    shown: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """One row of the table."""

    names: str
    keys: tuple[str, ...]
    read: Callable[[JsonObject], Asked]
    example: JsonObject


def first(row: JsonObject, *keys: str) -> Any:
    """The value of the first key that the row has and fills."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [], {})), None)


# ---- questions


def turns(value: Any) -> list[tuple[str, str]]:
    """Role and text of each turn of a conversation: `role`, `content`, or ShareGPT's `from`, `value`."""
    found = []
    for turn in value if isinstance(value, list) else ():
        if not isinstance(turn, dict):
            return []
        role, text = str(first(turn, "role", "from")), first(turn, "content", "value")
        if isinstance(text, list):  # OpenAI's content parts
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
                raise BadRow("a turn that is not all text")
            text = "".join(part["text"] for part in text)
        thought = turn.get("reasoning_content")
        if isinstance(thought, str) and isinstance(text, str):
            text = f"<think>\n{thought}\n</think>\n{text}"
        if isinstance(text, str):
            found.append((ROLES.get(role, role), text))
    return found


def question_of(row: JsonObject, *keys: str) -> str:
    """The question, under the first of `keys` or `QUESTIONS` that has one: text, or the user's only turn."""
    for key in (*keys, *QUESTIONS):
        value = row.get(key)
        asked = [text for role, text in turns(decoded(value)) if role == "user"]
        if len(asked) > 1:
            raise BadRow(f"a conversation of {len(asked)} questions in {key}")
        if asked or (isinstance(value, str) and value.strip()):
            context = row.get("context")  # OlympiadBench's
            return (f"{context}\n\n" if isinstance(context, str) and context else "") + (
                asked[0] if asked else str(value)
            )
    raise BadRow("no question; expected a key question, problem or prompt with text")


def decoded(value: Any) -> Any:
    """What a text that is JSON holds, where it is a list or an object; else the value itself."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# ---- answers


def gold(value: Any) -> str:
    """A reference answer as text; several are separated by commas. `BadRow` of what is none."""
    value = decoded(value) if isinstance(value, str) and value.startswith('["') else value
    parts = value if isinstance(value, list) else [value]
    if not parts or any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
        raise BadRow(f"the answer is {json.dumps(value, default=str)[:60]}, neither text nor a number")
    text = ", ".join(str(part).strip() for part in parts)
    return after_hashes(text) if "\n####" in text else text


def after_hashes(text: str) -> str:
    """GSM8K's answer: what follows `####`, without thousands separators."""
    return text.rpartition("####")[2].strip().replace(",", "")


def read_gold(row: JsonObject) -> Asked:
    """A row with a reference answer, or else a solution that boxes one."""
    value = first(row, *ANSWERS)
    if value is None:
        solution = first(row, "solution", "response")
        if not isinstance(solution, str):
            raise BadRow("no answer; expected a key answer, a solution that boxes one, or tests")
        value = last_boxed(solution) or (after_hashes(solution) if "####" in solution else "")
        if not value:
            raise BadRow("no answer: the solution boxes none")
    return Asked(question_of(row), gold(value))


def read_truth(row: JsonObject) -> Asked:
    """A row whose `ground_truth` is an answer or, in any form of `tests_of`, tests."""
    holder = next(
        (decoded(row.get(key)) for key in ("reward_model", "verification_info") if row.get(key)), row
    )
    holder = holder if isinstance(holder, dict) else row
    truth, name = first(holder, "ground_truth", "test_cases"), str(row.get("dataset"))
    if re.search("ifeval|general|quality", name):  # graded by a model, or by constraints
        raise BadRow(f"rows of {name} have no rule that checks an answer")
    found = tests_of(truth)
    if found and all(isinstance(test, StdioTest) or "assert" in test for test in found):
        return program(row, found)
    return Asked(question_of(row), gold(first(row, *ANSWERS) if truth is None else truth))


# ---- programs


def tests_of(value: Any, starter: str = "") -> Tests:
    """Tests, however they are written; () of what is none: a statement, a list of them or of objects with
    `input` and `output`, or an object of `inputs` and `outputs`; `fn_name` is a function to call."""
    value = decoded(value)
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if isinstance(value, dict):
        inputs, outputs = first(value, "inputs", "input"), first(value, "outputs", "output")
        if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
            return ()
        return cases(list(zip(inputs, outputs, strict=True)), value.get("fn_name"), starter)
    if not isinstance(value, list):
        return ()
    if len(value) == 1 and isinstance(decoded(value[0]), list | dict) and isinstance(value[0], str):
        return tests_of(value[0], starter)
    if all(isinstance(test, str) for test in value):
        return tuple(value)
    if not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in value):
        return ()
    name = next((name for test in value if (name := test.get("fn_name"))), None)
    return cases([(test["input"], test["output"]) for test in value], name, starter)


def cases(pairs: list[tuple[Any, Any]], function: Any, starter: str) -> Tests:
    """Cases of stdin and stdout, or calls of a function with the arguments of each input.

    APPS and TACO wrap each expected value in a list, LeetCode's sets have JSON, an argument a line.
    """
    if not function:
        return tuple(StdioTest(lines(given), lines(expected)) for given, expected in pairs)
    target = f"Solution().{function}" if "class Solution" in starter else str(function)
    expect = [json_of(output) for _, output in pairs]
    if all(isinstance(output, list) and len(output) == 1 for output in expect):
        expect = [output[0] for output in expect]
    calls = (", ".join(arguments(given)) for given, _ in pairs)
    return tuple(f"assert {target}({call}) == {output!r}" for call, output in zip(calls, expect, strict=True))


def arguments(given: Any) -> list[str]:
    """The arguments of a call as Python: a list, an object of named ones, or JSON values, one a line."""
    if isinstance(given, dict):
        return [f"{name}={value!r}" for name, value in given.items()]
    values = given if isinstance(given, list) else [json_of(line) for line in str(given).split("\n") if line]
    return [repr(value) for value in values]


def json_of(text: Any) -> Any:
    """The value of a text in JSON, else the text."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def lines(value: Any) -> str:
    """Text of stdin or stdout, which some sets have as a list of lines."""
    return "\n".join(map(lines, value)) if isinstance(value, list) else str(value)


def program(row: JsonObject, tests: Tests, question: str = "", shown: int = 0) -> Asked:
    """A programming problem whose question says what to answer with."""
    question = question or question_of(row)
    if isinstance(tests[0], StdioTest):
        return Asked(f"{question}\n\n{STDIO}", tests=tests, shown=shown)
    found = decoded(row.get("test_info"))  # KodCode's
    declared = [info.get("function_declaration") for info in found or () if isinstance(info, dict)]
    starter = first(row, "starter_code") or "\n".join(filter(None, declared))
    called = re.match(r"assert (?:Solution\(\)\.)?(\w+)\(", tests[0])
    name = f" that defines `{called[1]}`" if called and not hasattr(builtins, called[1]) else ""
    shape = f" and begins with\n\n```python\n{starter.rstrip()}\n```" if starter else "."
    task = f"{BLOCK}{name or ' with a program'} with all its imports{shape}"
    return Asked(f"{question}\n\n{task}", tests=tests, shown=shown)


def read_check(row: JsonObject) -> Asked:
    """HumanEval's: one test that calls `check` with the function; the prompt's helpers are the test's own."""
    prompt, entry = str(row.get("prompt") or ""), str(row["entry_point"])
    test = "\n".join(filter(None, (preamble(prompt, entry), str(row["test"]), f"check({entry})")))
    if any(
        row.get(key) for key in ("query", "problem_description")
    ):  # LeetCodeDataset, whose prompt is imports
        return program(row, (test,), question_of(row, "query", "problem_description"))
    task = "Complete this Python function. Answer with the whole function and its imports in one"
    return Asked(f"{task} ```python block.\n\n```python\n{question_of(row).rstrip()}\n```", tests=(test,))


def read_listed(row: JsonObject) -> Asked:
    """MBPP's: asserts that name the function, all of which the question shows."""
    given = first(row, "test_setup_code") or first(row, "test_imports") or ""
    setup = "\n".join(given) if isinstance(given, list) else str(given)
    listed, more = tuple(map(str, row["test_list"])), (row["test"],) if row.get("test") else ()
    before = (setup,) if setup.strip() else ()
    task = f"{BLOCK}. It should pass these tests:"
    question = "\n".join([question_of(row), "", task, "", *listed])
    return Asked(question, "", (*before, *listed, *more), len(before) + len(listed))


def read_cases(row: JsonObject) -> Asked:
    """Tests under any of the keys that they have; statements of our own rows stand alone."""
    key = next(key for key in CASES if row.get(key))
    value, starter = row[key], str(row.get("starter_code") or "")
    found = tests_of(value, starter)
    if not found:
        raise BadRow(f"{key}: a test is a Python statement or an object with input and output")
    if key == "tests" and isinstance(found[0], str) and not starter:
        return Asked(question_of(row), tests=found)
    return program(row, found, question_of(row, "prompt_sft"))


def read_columns(row: JsonObject) -> Asked:
    """CodeContests': public tests, which the question shows, private and generated ones."""
    parts = [tests_of(row.get(f"{name}_tests") or []) for name in ("public", "private", "generated")]
    tests = tuple(test for part in parts for test in part)
    if not tests:
        raise BadRow("none of public_tests, private_tests and generated_tests has input and output")
    return program(row, tests, shown=len(parts[0]))


def read_lcb(row: JsonObject) -> Asked:
    """LiveCodeBench's: public tests, which the question shows, and private ones, mostly packed."""
    meta, starter = decoded(row.get("metadata")), str(row.get("starter_code") or "")
    name = meta.get("func_name") if isinstance(meta, dict) else None
    public, private = decoded(row["public_test_cases"]), unpacked(row.get("private_test_cases") or "[]")
    if not (isinstance(public, list) and isinstance(private, list)):
        raise BadRow("public_test_cases and private_test_cases are not lists of tests")
    functional = any(
        isinstance(test, dict) and test.get("testtype") == "functional" for test in public + private
    )
    named = {"fn_name": name} if functional else {}
    if not (
        tests := tests_of([named | test for test in public + private if isinstance(test, dict)], starter)
    ):
        raise BadRow("no test with input and output")
    return program(row, tests, shown=len(public))


def unpacked(packed: Any) -> Any:
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickled JSON text, which is never
    unpickled: its one string is taken from the list of its instructions."""
    found = decoded(packed)
    if not isinstance(found, str):
        return found
    harmless = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(found, validate=True), MOST_BYTES)
        steps = [(op.name, value) for op, value, _ in pickletools.genops(data) if op.name not in harmless]
    except (ValueError, zlib.error) as error:
        raise BadRow(f"private_test_cases are neither JSON nor packed JSON: {error}") from error
    if len(steps) != 1 or "UNICODE" not in steps[0][0]:
        raise BadRow("private_test_cases are a pickle of more than one text, which is not opened")
    return json_of(steps[0][1])


SHAPES = (
    Shape("HumanEval, LeetCodeDataset", ("entry_point", "test"), read_check, {
        "task_id": "H/0", "prompt": "def f(x):\n    pass\n", "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate(1) == 2"}),
    Shape("MBPP (full, sanitized, plus)", ("test_list",), read_listed, {
        "task_id": 1, "text": "Add one.", "test_list": ["assert f(1) == 2"]}),
    Shape("LiveCodeBench", ("public_test_cases",), read_lcb, {
        "question_content": "Add one.", "starter_code": "class Solution:\n    def f(self, x): ...",
        "public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]',
        "private_test_cases": "[]", "metadata": '{"func_name": "f"}'}),
    Shape("CodeContests", ("public_tests",), read_columns, {
        "name": "1_A", "description": "Add one.", "public_tests": {"input": ["1\n"], "output": ["2\n"]},
        "private_tests": {"input": [], "output": []}}),
    Shape("APPS, TACO", ("input_output",), read_cases, {
        "question": "Add one.", "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}'}),
    Shape("our own, DeepCoder", ("tests",), read_cases, {
        "question": "Write f.", "tests": ["assert f(1) == 2"]}),
    Shape("open-r1's", ("test_cases",), read_cases, {
        "prompt": "Add one.", "test_cases": [{"input": "1", "output": "2"}]}),
    Shape("open-r1/codeforces", ("official_tests",), read_cases, {
        "description": "Add one.", "official_tests": [{"input": "1", "output": "2"}]}),
    Shape("KodCode, DeepSeek's LeetCode", ("test",), read_cases, {
        "question": "Add one.", "test": "from solution import f\n\ndef test_f():\n    assert f(1) == 2"}),
    Shape("verl, DAPO-Math-17k, Skywork-OR1", ("reward_model",), read_truth, {
        "data_source": "math_dapo", "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"}}),
    Shape("SYNTHETIC-1", ("verification_info",), read_truth, {
        "prompt": "1+1?", "verification_info": '{"ground_truth": "2"}'}),
    Shape("Tülu 3, Dolci, Open-Reasoner-Zero", ("ground_truth",), read_truth, {
        "messages": [{"role": "user", "content": "1+1?"}], "ground_truth": "2", "dataset": "math"}),
    Shape("GSM8K, MATH, AIME, OlympiadBench, NuminaMath, and any with a gold or a solution", (), read_gold, {
        "problem": "1+1?", "answer": "2"}),
)  # fmt: skip
"""The first that has all of its keys reads a row."""
