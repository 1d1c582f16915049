"""Rows as the known data sets have them, two a file: each is asked and checked as its data set means it."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib

import pytest

from pipeline.data.corpus import read_corpus
from pipeline.data.jsonl import BadRow, write_jsonl
from pipeline.data.problems import problems
from pipeline.data.rows import plain, to_problem
from pipeline.data.shapes import SHAPES, first
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings
from rollout.types import StdioTest

STRICT = RowSettings(max_bad_rows=0)
USER = [{"role": "system", "content": "Think."}, {"role": "user", "content": "3 + 4?"}]
CASES = json.dumps([{"input": "3 4", "output": "7", "testtype": "stdin"}])


def packed(tests: str) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(tests))).decode()


GOLDS = {
    "gsm8k": {"question": "3 + 4?", "answer": "It is <<3+4=7>>7.\n#### 7"},
    "gsm8k with thousands": ({"question": "3 + 4?", "answer": "Many.\n#### 1,007"}, "1007"),
    "math": {"problem": "3 + 4?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{7}$."},
    "math500": {"problem": "3 + 4?", "solution": "$\\boxed{8}$", "answer": "7", "unique_id": "t/1.json"},
    "prm800k": {"labeler": "a", "question": {"problem": "3 + 4?", "ground_truth_answer": "7"}},
    "aime": {"ID": "2024-I-1", "Problem": "3 + 4?", "Solution": "Add.", "Answer": 7},
    "amc": {"id": 0, "problem": "3 + 4?", "answer": 7.0, "url": "x"},
    "olympiadbench": {
        "id": 1606, "question": "3 + 4?", "solution": ["Add."], "final_answer": ["7"], "context": None,
        "is_multiple_answer": False, "language": "English", "answer_type": "Numerical", "unit": None,
    },
    "olympiadbench, several": (
        {"question": "3 + 4?", "final_answer": ["7", "-7"], "is_multiple_answer": True,
         "language": "Chinese"}, "7, -7"),
    "minerva": {"question": "3 + 4?", "answer": "7"},
    "minerva, worked": {"problem": "3 + 4?", "type": "Physics", "solution": "It is \\boxed{7} m."},
    "dapo": {
        "data_source": "math_dapo", "prompt": [{"content": "3 + 4?", "role": "user"}],
        "ability": "MATH", "reward_model": {"ground_truth": "7", "style": "rule"}, "extra_info": {},
    },
    "verl": {"data_source": "openai/gsm8k", "prompt": USER, "extra_info": {"split": "train", "index": 0},
             "reward_model": {"style": "rule", "ground_truth": "7"}},
    "skywork": {"prompt": json.dumps(USER), "reward_model": {"ground_truth": '["7"]', "style": "rule"}},
    "numina": {"problem": "3 + 4?", "solution": "Add.", "answer": "7", "problem_type": "Algebra"},
    "openr1": {"problem": "3 + 4?", "answer": "7", "generations": ["a"], "messages": USER},
    "big-math": {"problem": "3 + 4?", "answer": "7", "source": "orca", "domain": ["Arithmetic"]},
    "deepscaler": {"problem": "3 + 4?", "answer": "7", "solution": ""},
    "openmathreasoning": {"problem": "3 + 4?", "expected_answer": "7", "generated_solution": "Add."},
    "orz": [{"from": "human", "value": "3 + 4?"},
            {"from": "assistant", "ground_truth": {"value": "7", "pass_at_n": 0.5}}],
    "orz on the hub": {"0": {"from": "user", "value": "3 + 4?"},
                       "1": {"from": "assistant", "ground_truth": {"value": "7"}}},
    "tulu": {"messages": USER, "ground_truth": "7", "dataset": "gsm8k", "constraint": None},
    "dolci": {"messages": USER, "ground_truth": ["7"], "dataset": ["math"]},
    "synthetic-1": {"problem_id": "v1", "task_type": "verifiable_math", "prompt": "3 + 4?",
                    "verification_info": '{"ground_truth": "7"}'},
    "sharegpt with a gold": {"conversations": [{"from": "human", "value": "3 + 4?"}], "answer": "7"},
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDS)
def test_rows_with_a_gold(tmp_path, name):
    row, answer = given if isinstance(given := GOLDS[name], tuple) else (given, "7")
    (tmp_path / "two.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    (tmp_path / "two.json").write_text(json.dumps([row, row], indent=1))
    for file in ("two.jsonl", "two.json"):
        found = problems(str(tmp_path / file), rows=STRICT)
        assert [(p.kind, p.question, p.tests) for p in found] == [("math", "3 + 4?", ())] * 2
        assert all(p.answer.removesuffix(".0") == answer for p in found), found
    assert found[0].language == ("zh" if "Chinese" in str(row) else "en")


STDIO = (StdioTest("3 4", "7"),)
CALL = ("assert add(3, 4) == 7",)
METHOD = ("assert Solution().add(3, [4]) == [7]",)
TWO_CALLS = [{"input": "3\n[4]", "output": "[7]", "testtype": "functional"},
             {"input": "1\n[1]", "output": "[1, 1]", "testtype": "functional"}]  # fmt: skip
PYTEST = "from solution import add\n\ndef test_add():\n    assert add(3, 4) == 7"
CHECK = "def check(candidate):\n    assert candidate(3, 4) == 7"
HELPED = "import math\n\ndef two():\n    return 2\n\ndef add(a, b):\n    # Add.\n    ...\n"
STARTER = "class Solution:\n    def add(self, a: int, b: list[int]) -> list[int]:\n        "
PROGRAMS = {
    "apps": ({"question": "Add.", "input_output": '{"inputs": ["3 4"], "outputs": ["7"]}', "starter_code": "",
              "solutions": "[]"}, STDIO, 0),
    "apps, a function": (
        {"question": "Add.", "input_output": '{"fn_name": "add", "inputs": [[3, 4]], "outputs": [[7]]}',
         "starter_code": "def add(a, b):"}, CALL, 0),
    "taco, lines": ({"question": "Add.", "name": None, "starter_code": "", "source": "codeforces",
                     "input_output": {"inputs": [["3", "4"]], "outputs": [["7"]]}},
                    (StdioTest("3\n4", "7"),), 0),
    "taco, a method": (
        {"question": "Add.", "starter_code": STARTER,
         "input_output": '{"fn_name": "add", "inputs": [[3, [4]], [1, [1]]], "outputs": [[7], [1, 1]]}'},
        (*METHOD, "assert Solution().add(1, [1]) == [1, 1]"), 0),
    "code contests": (
        {"name": "1_A. Add", "description": "Add.", "public_tests": {"input": ["3 4"], "output": ["7"]},
         "private_tests": {"input": ["1 1"], "output": ["2"]}, "generated_tests": {"input": [], "output": []},
         "source": 2}, (*STDIO, StdioTest("1 1", "2")), 1),
    "livecodebench": (
        {"question_title": "A", "question_content": "Add.", "question_id": "a", "starter_code": "",
         "public_test_cases": CASES, "private_test_cases": CASES, "metadata": "{}"}, STDIO * 2, 1),
    "livecodebench, packed": (
        {"question_content": "Add.", "public_test_cases": CASES, "private_test_cases": packed(CASES)},
        STDIO * 2, 1),
    "livecodebench, a method": (
        {"question_content": "Add.", "starter_code": STARTER, "metadata": '{"func_name": "add"}',
         "public_test_cases": json.dumps(TWO_CALLS)},
        (*METHOD, "assert Solution().add(1, [1]) == [1, 1]"), 2),
    "kodcode": (
        {"question": "Add.", "solution": "def add(a, b): ...", "style": "instruct", "question_id": "K_1",
         "test": PYTEST,
         "test_info": [{"function_name": "add", "function_declaration": "def add(a, b):"}]},
        (PYTEST,), 0),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": HELPED, "entry_point": "add", "test": CHECK},
        (f"import math\ndef two():\n    return 2\n{CHECK}\ncheck(add)",), 0),
    "mbpp": ({"task_id": 1, "text": "Add.", "code": "x", "test_list": [*CALL], "test_setup_code": "",
              "challenge_test_list": []}, CALL, 1),
    "mbpp, sanitized": (
        {"task_id": 1, "prompt": "Add.", "test_imports": ["import math", "import re"], "test_list": [*CALL]},
        ("import math\nimport re", *CALL), 2),
    "mbpp plus": ({"task_id": 1, "prompt": "Add.", "test_list": [*CALL], "test": "assert add(1, 1) == 2"},
                  (*CALL, "assert add(1, 1) == 2"), 1),
    "leetcode": (
        {"task_id": "add", "problem_description": "Add.", "prompt": "import random", "starter_code": STARTER,
         "entry_point": "Solution().add", "test": CHECK,
         "input_output": [{"input": "a = 3", "output": "7"}], "query": "Add."},
        (f"import random\n{CHECK}\ncheck(Solution().add)",), 0),
    "leetcode, deepseek": ({"task_id": 1, "prompt": "class Solution: ...", "prompt_sft": "Add.",
                            "test": "assert Solution().add(3, [4]) == [7]"}, METHOD, 0),
    "verl, code": ({"prompt": [{"role": "user", "content": "Add."}], "ability": "code", "reward_model":
                    {"style": "rule", "ground_truth": CASES}}, STDIO, 0),
    "verl, inputs": ({"prompt": [{"role": "user", "content": "Add."}], "reward_model":
                      {"ground_truth": '{"inputs": ["3 4"], "outputs": ["7"]}'}}, STDIO, 0),
    "deepcoder": ({"problem": "Add.", "tests": CASES, "metadata": {}}, STDIO, 0),
    "dolci, code": ({"messages": [{"role": "user", "content": "Add."}], "dataset": ["code"],
                     "ground_truth": [json.dumps(CALL)]}, CALL, 0),
    "tulu, stdio": ({"messages": [{"role": "user", "content": "Add."}], "dataset": "code_stdio",
                     "ground_truth": CASES}, STDIO, 0),
    "synthetic-1": ({"prompt": "Add.", "verification_info": json.dumps({"language": "python", "test_cases": [
        {"type": "stdin_stdout", "input": "3 4", "output": "7", "fn_name": None}]})}, STDIO, 0),
    "codeforces": ({"description": "Add.", "official_tests": json.loads(CASES), "language": "py"}, STDIO, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_with_tests(tmp_path, name):
    row, tests, shown = PROGRAMS[name]
    (tmp_path / "two.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    found = problems(str(tmp_path / "two.jsonl"), rows=STRICT)
    assert [(p.kind, p.tests, p.shown, p.answer) for p in found] == [("code", tests, shown, "")] * 2
    assert all("Add." in p.question and "```python" in p.question for p in found)
    starter = row.get("starter_code") or ""
    assert starter.strip() in found[0].question, "the question states the signature that the tests call"
    assert not starter or "add" in found[0].question


@pytest.mark.parametrize(
    "options",
    [
        {"choices": ["5", "7"]},
        {"options": {"A": "5", "B": "7"}},
        {"choices": {"text": ["5"], "label": ["A"]}},
    ],
)
def test_a_question_without_its_options_is_not_asked(options):
    row = {"question": "Which is odd and above 4?", "answer": 1} | options
    with pytest.raises(BadRow, match="multiple choice question whose text does not have the options"):
        to_problem(row, "s", 0, {})
    row["question"] += " A: 5 B: 7"
    assert to_problem(row, "s", 0, {}).question == row["question"]


def test_a_question_in_two_parts_is_asked_in_full():
    row = {"Body": "Ann has 3 pens and buys 4.", "Question": "How many now?", "Answer": 7.0}
    assert to_problem(row, "s", 0, {}).question == "Ann has 3 pens and buys 4.\n\nHow many now?"
    assert to_problem(row, "s", 0, {"question": "Body"}).question == row["Body"]


def test_a_row_of_a_conversation_and_a_short_solution_has_that_as_its_answer(tmp_path):
    assert to_problem({"prompt": USER, "solution": "$7$"}, "s", 0, {}).answer == "$7$"
    for row in ({"problem": "3 + 4?", "solution": "7"}, {"prompt": USER, "solution": "So it is\n7."}):
        write_jsonl(tmp_path / "a.jsonl", [row])
        with pytest.raises(UserError, match=r"no answer; .*; --fields names keys that are called otherwise$"):
            problems(str(tmp_path / "a.jsonl"))


def test_a_question_may_be_json_itself():
    for text in ('{"a": 1}', "[1, 2]", "5", '"x"'):
        assert to_problem({"question": text, "answer": "1"}, "s", 0, {}).question == text


EXAMPLES = {
    "test_list": {"text": "Add one.", "test_list": ["assert f(1) == 2"]},
    "public_test_cases": {
        "question_content": "Add one.", "private_test_cases": "", "metadata": '{"func_name": "f"}',
        "public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]'},
    "public_tests": {"description": "Add one.", "public_tests": {"input": ["1\n"], "output": ["2\n"]}},
    "test": {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1) == 2"},
    "input_output": {
        "question": "Add one.", "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}'},
    "tests": {"question": "Write f.", "tests": ["assert f(1) == 2"]},
    "test_cases": {"prompt": "Add one.", "test_cases": [{"input": "1", "output": "2"}]},
    "official_tests": {"description": "Add one.", "official_tests": [{"input": "1", "output": "2"}]},
    "ground_truth": {
        "prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}},
    "": {"problem": "1+1?", "answer": "2"},
}  # fmt: skip


def test_every_shape_of_the_table_reads_its_example():
    assert EXAMPLES.keys() == SHAPES.keys()
    for key, (read, names) in SHAPES.items():
        example = EXAMPLES[key]
        row = plain(example, {})
        assert next(k for k in SHAPES if not k or first(row, k)) == key, names
        problem = to_problem(example, "example", 0, {})
        assert read(row).tests == problem.tests and bool(problem.tests) != bool(problem.answer), names


class Opened:
    """What a pickle of the wrong kind would do."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


@pytest.mark.parametrize("what", [Opened(), ["a", "b"], {"input": "1"}])
def test_a_pickle_is_never_opened(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    data = base64.b64encode(zlib.compress(pickle.dumps(what))).decode()
    row = {"question_content": "Add.", "public_test_cases": CASES, "private_test_cases": data}
    (tmp_path / "lcb.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="private_test_cases are a pickle of more than one text"):
        problems("lcb.jsonl")
    assert not (tmp_path / "opened").exists()


# ---- traces

TRACE, TAGGED = "<think>\nAdd.\n</think>\n\n7", "<think>\nAdd.\n</think>\n<answer>7</answer>"
MARKED = (
    "<|begin_of_thought|>\n\nAdd.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n7\n\n<|end_of_solution|>"
)
TRACES = {
    "openthoughts": ({"system": "Think.", "conversations": [
        {"from": "user", "value": "3+4?"}, {"from": "assistant", "value": MARKED}]}, TAGGED),
    "openthoughts, metadata": (
        {"problem": "3+4?", "deepseek_reasoning": "Add.", "deepseek_solution": "7"}, TAGGED),
    "openr1": ({"problem": "3+4?", "answer": "7", "generations": [TRACE], "messages": USER}, TAGGED),
    "messages": ({"messages": [{"role": "user", "content": "3+4?"},
                               {"role": "assistant", "content": TRACE}]}, TAGGED),
    "reasoning_content": ({"instruction": "3+4?", "content": "7", "reasoning_content": "Add."}, TAGGED),
    "trl messages": ({"messages": [{"role": "user", "content": "3+4?"},
                                   {"role": "assistant", "content": "It is 7."}]}, "It is 7."),
    "trl prompt and completion": ({"prompt": "3+4?", "completion": "It is 7."}, "It is 7."),
    "trl conversational": ({"prompt": [{"role": "user", "content": "3+4?"}],
                            "completion": [{"role": "assistant", "content": "It is 7."}]}, "It is 7."),
    "sharegpt": ({"conversations": [{"from": "system", "value": "Hi."}, {"from": "human", "value": "3+4?"},
                                    {"from": "gpt", "value": "It is 7."}, {"from": "human", "value": "Sure?"},
                                    {"from": "gpt", "value": "Yes."}]}, "It is 7."),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACES)
def test_traces(tmp_path, name):
    row, completion = TRACES[name]
    (tmp_path / "two.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    found = read_corpus(tmp_path / "two.jsonl", rows=STRICT)
    assert [(row.question, row.completion) for row in found] == [("3+4?", completion)] * 2


# ---- files
