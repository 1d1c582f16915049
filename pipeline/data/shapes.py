"""What public data sets call things: a table of the shapes that rows have.

A row is read by the first shape of `SHAPES` whose key it fills. Keys are compared in lower case; `--fields`
names the keys of any other shape. All share how a question is found (text, or the turns of a conversation)
and how the tests of a program may be written.
"""

import base64
import builtins
import json
import pickletools
import re
import zlib
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
QUESTIONS = (
    *("question", "problem", "prompt_sft", "query", "problem_description", "prompt", "text", "instruction"),
    *("description", "question_content", "messages", "conversations"),
)
ANSWERS = ("ground_truth", "answer", "final_answer", "expected_answer", "ground_truth_answer")
CASES = (
    *(("public_tests", "private_tests", "generated_tests"), ("public_test_cases", "private_test_cases")),
    *(("input_output",), ("tests",), ("test_cases",), ("official_tests",), ("test",)),
)
"""Keys of tests; of several, the question shows the first ones' tests."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asks, and what checks the answer: a gold, or tests, the first `shown` of which it shows."""

    question: str
    answer: str = ""
    tests: Tests = ()
    shown: int = 0


def first(row: JsonObject, *keys: str) -> Any:
    """The value of the first key that the row has and fills."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [], {})), None)


def json_of(text: Any) -> Any:
    """The value of a text in JSON, else the text."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def turns(value: Any) -> list[tuple[str, str]]:
    """Role and text of each turn of a conversation: `role`, `content`, or ShareGPT's `from`, `value`."""
    every = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    said = [(first(turn, "role", "from"), first(turn, "content", "value")) for turn in every]
    names = {"human": "user", "gpt": "assistant"}
    return [(names.get(str(role), str(role)), text) for role, text in said if isinstance(text, str)]


def question_of(row: JsonObject) -> str:
    """The question: text, or the user's only turn. Raises `BadRow`: none, several, or one whose options it
    does not show."""
    options = json_of(first(row, "choices", "options"))  # MMLU, ARC, MedQA
    options = options.get("text") or [*options.values()] if isinstance(options, dict) else options
    for key in QUESTIONS:
        asked = [text for role, text in turns(json_of(row.get(key))) if role == "user"]
        if len(asked) > 1:
            raise BadRow(f"a conversation of {len(asked)} questions in {key}")
        if asked or (isinstance(row.get(key), str) and row[key].strip()):
            context, text = (
                first(row, "context", "body"),
                (asked or [row[key]])[0],
            )  # OlympiadBench's, SVAMP's
            if isinstance(context, str) and context not in text:
                text = f"{context}\n\n{text}"
            given = row.get("input") if key == "instruction" else None  # Alpaca's
            text += f"\n\n{given}" if isinstance(given, str) and given.strip() else ""
            if isinstance(options, list) and not all(str(option) in text for option in options):
                raise BadRow("a multiple choice question whose text does not have the options")
            return text
    raise BadRow("no question; expected a key question, problem or prompt with text")


def read_answer(row: JsonObject) -> Asked:
    """A row with an answer, or with tests in its place, or with a solution that boxes an answer."""
    value, dataset = first(row, *ANSWERS), str(row.get("dataset"))
    if re.search("ifeval|general", dataset):  # of Tülu and Dolci: graded by constraints, or by a model
        raise BadRow(f"rows of {dataset} have no rule that checks an answer")
    tests = () if isinstance(json_of(value), str) else tests_of(value)
    if tests and all(isinstance(test, StdioTest) or "assert" in test for test in tests):
        return program(row, tests)
    if value is None and isinstance(solution := first(row, "solution", "response"), str):
        value = last_boxed(solution) or (after_hashes(solution) if "####" in solution else None)
        if value is None and turns(json_of(row.get("prompt"))) and "\n" not in solution.strip():
            value = solution  # TRL's, such as trl-lib/DeepMath-103K
    if value is None:
        raise BadRow("no answer; expected a key answer, a solution that boxes one, or tests")
    parts = json_of(value) if isinstance(value, str) and value.startswith('["') else value  # Skywork-OR1's
    parts = parts if isinstance(parts, list) else [parts]
    if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
        raise BadRow(f"the answer is {json.dumps(value, default=str)[:60]}, neither text nor a number")
    text = ", ".join(str(part).strip() for part in parts)
    return Asked(question_of(row), after_hashes(text) if "\n####" in text else text)


def after_hashes(text: str) -> str:
    """GSM8K's answer: what follows `####`, without thousands separators."""
    return text.rpartition("####")[2].strip().replace(",", "")


def tests_of(value: Any, starter: str = "", function: str | None = None) -> Tests:
    """Tests, however they are written; () of what is none: a statement, a list of them or of objects with
    `input` and `output`, or an object of `inputs` and `outputs`; `fn_name` is a function to call."""
    value = json_of(value)
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if isinstance(value, dict):
        inputs, outputs = first(value, "inputs", "input"), first(value, "outputs", "output")
        if isinstance(inputs, list) and isinstance(outputs, list):
            return cases(inputs, outputs, value.get("fn_name") or function, starter)
    elif isinstance(value, list) and value:
        if all(isinstance(test, str) for test in value):
            packed = len(value) == 1 and isinstance(json_of(value[0]), list)  # Dolci's
            return tests_of(value[0], starter) if packed else tuple(value)
        if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in value):
            called = value[0].get("fn_name") or function
            return cases([t["input"] for t in value], [t["output"] for t in value], called, starter)
    return ()


def cases(inputs: list[Any], outputs: list[Any], function: Any, starter: str) -> Tests:
    """Cases of stdin and stdout, or calls of a function with the arguments of each input. APPS and TACO wrap
    each expected value in a list; LiveCodeBench has JSON, an argument a line."""
    if len(inputs) != len(outputs):
        raise BadRow(f"{len(inputs)} inputs of tests, and {len(outputs)} outputs")
    if not function:
        return tuple(StdioTest(*map(lines, case)) for case in zip(inputs, outputs, strict=True))
    target = f"Solution().{function}" if "class Solution" in starter else function
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    tests = []
    for given, expected in zip(inputs, outputs, strict=True):
        values = given if isinstance(given, list) else map(json_of, str(given).splitlines())
        tests.append(f"assert {target}({', '.join(map(repr, values))}) == {json_of(expected)!r}")
    return tuple(tests)


def lines(value: Any) -> str:
    """Text of stdin or stdout, which some sets have as a list of lines."""
    return "\n".join(map(lines, value)) if isinstance(value, list) else str(value)


def program(row: JsonObject, tests: Tests, shown: int = 0) -> Asked:
    """A programming problem whose question says what to answer with."""
    task = f"{BLOCK}: a program that reads stdin and writes stdout."
    if isinstance(tests[0], str):
        info = json_of(row.get("test_info"))  # KodCode's
        declared = [of.get("function_declaration") for of in info or () if isinstance(of, dict)]
        starter = first(row, "starter_code") or "\n".join(filter(None, declared))
        called = re.match(r"assert (?:Solution\(\)\.)?(\w+)\(", tests[0])
        name = f" that defines `{called[1]}`" if called and not hasattr(builtins, called[1]) else ""
        task = f"{BLOCK}{name}, all its imports included"
        task += f". It begins with\n\n```python\n{starter.rstrip()}\n```" if starter else "."
    return Asked(f"{question_of(row)}\n\n{task}", tests=tests, shown=shown)


def read_check(row: JsonObject) -> Asked:
    """HumanEval's: one test that calls `check` with the function; the prompt's helpers are the test's own."""
    prompt, entry = str(row.get("prompt") or ""), str(row.get("entry_point"))
    if not row.get("entry_point"):
        return read_cases(row)
    test = "\n".join(filter(None, (preamble(prompt, entry), str(row["test"]), f"check({entry})")))
    if (question := question_of(row)) != prompt:  # LeetCodeDataset, whose prompt is imports
        return program(row, (test,))
    task = "Complete this Python function. Answer with the whole function and its imports in one"
    return Asked(f"{task} ```python block.\n\n```python\n{question.rstrip()}\n```", tests=(test,))


def read_listed(row: JsonObject) -> Asked:
    """MBPP's: asserts that name the function, all of which the question shows."""
    given = first(row, "test_setup_code") or first(row, "test_imports") or ""
    setup = "\n".join(given) if isinstance(given, list) else str(given)
    before, listed = (setup,) if setup.strip() else (), tests_of(row["test_list"])
    if not all(isinstance(test, str) for test in listed) or not isinstance(row["test_list"], list):
        raise BadRow("test_list is not a list of statements")
    more = (row["test"],) if isinstance(row.get("test"), str) else ()
    said = [question_of(row), "", f"{BLOCK}. It should pass these tests:", "", *map(str, listed)]
    return Asked("\n".join(said), tests=(*before, *listed, *more), shown=len(before) + len(listed))


def read_cases(row: JsonObject) -> Asked:
    """Tests under any of the keys that they have; statements of our own rows stand alone."""
    keys = next(keys for keys in CASES if first(row, *keys))
    starter, meta = str(row.get("starter_code") or ""), json_of(row.get("metadata"))
    name = meta.get("func_name") if isinstance(meta, dict) else None
    values = (unpacked(row.get(key)) if key == "private_test_cases" else row.get(key) for key in keys)
    parts = [tests_of(value, starter, name) for value in values]
    tests = tuple(test for part in parts for test in part)
    if not tests:
        raise BadRow(f"{keys[0]}: a test is a Python statement or an object with input and output")
    if keys == ("tests",) and isinstance(tests[0], str) and not starter:
        return Asked(question_of(row), tests=tests)
    return program(row, tests, len(parts[0]) if len(keys) > 1 else 0)


def unpacked(packed: Any) -> Any:
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickled JSON text, which is never
    unpickled: its one string is taken from the list of its instructions."""
    if not (found := json_of(packed)) or not isinstance(found, str):
        return found
    harmless = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(found, validate=True), MOST_BYTES)
        steps = [(op.name, value) for op, value, _ in pickletools.genops(data) if op.name not in harmless]
    except (ValueError, zlib.error) as error:
        raise BadRow(f"private_test_cases are neither JSON nor packed JSON: {error}") from error
    if len(steps) != 1 or "UNICODE" not in steps[0][0]:
        raise BadRow("private_test_cases are a pickle of more than one text, which is not opened")
    return steps[0][1]


SHAPES = {
    "test_list": (read_listed, "MBPP"),
    "public_test_cases": (read_cases, "LiveCodeBench"),
    "public_tests": (read_cases, "CodeContests"),
    "test": (read_check, "HumanEval, LeetCodeDataset, KodCode, DeepSeek's LeetCode"),
    "input_output": (read_cases, "APPS, TACO"),
    "tests": (read_cases, "our own, DeepCoder"),
    "test_cases": (read_cases, "SYNTHETIC-1, open-r1's"),
    "official_tests": (read_cases, "open-r1/codeforces"),
    "ground_truth": (read_answer, "verl, DAPO, Skywork-OR1, Tülu, Dolci, Open-Reasoner-Zero"),
    "": (read_answer, "GSM8K, MATH, AIME, OlympiadBench, NuminaMath; any with an answer or a boxed one"),
}
"""By the key that makes it: how it is read, the data sets that have it."""
