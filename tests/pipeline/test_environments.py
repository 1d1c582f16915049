"""The built-in environments: a Python tool in the sandbox, and those of the package verifiers."""

from __future__ import annotations

import sys
import time
import types

import pytest

from pipeline.data.generators import items
from pipeline.environments import open_environment, python_step
from pipeline.errors import UserError
from rewards.pool import WorkerPool
from rollout.types import Problem

ASKED = {"role": "user", "content": "?"}


@pytest.fixture(scope="module")
def answer():
    """`answer(turn)`: of the Python tool."""
    with WorkerPool(1) as pool:
        step = open_environment("python", pool).start(Problem("p", "math", "?"))
        yield lambda turn: step([ASKED, {"role": "assistant", "content": turn}])


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ("So <python>print(47*93)</python>", "<output>4371</output>"),
        ("```python\nx = 3\nprint(x)\nprint(4)\n```\n", "```output\n3\n4\n```\n"),
        ("<python>print(1)</python> then <python>print(2)</python>", "<output>2</output>"),
        ("<python>x = 1</python>", "<output>(no output)</output>"),
        ("<python>1/0</python>", "ZeroDivisionError"),
        ("<python>def f(:</python>", "SyntaxError"),
        ("<python>open('/etc/passwd')</python>", "PermissionError"),
        ("<python>import socket; socket.socket()</python>", "PermissionError"),
        ("<python>import os; os._exit(3)</python>", "exited with status 3"),
        ("<python>print('\\ud800')</python>", "<output>"),
    ],
)
def test_a_program_at_the_end_of_a_turn_runs(answer, turn, says):
    assert says in answer(turn)


def test_what_is_no_call(answer):
    assert answer("The answer is 3.") is None and answer("```text\nx\n```\nso") is None
    assert answer("```\nprint(1)\n```\n") == ""  # the turn ended at a mark, and goes on
    assert answer("<python>print(1)</python> is how") is None


def test_a_tool_that_hangs_or_prints_megabytes_costs_little(answer):
    began = time.monotonic()
    assert "time ran out" in answer("<python>print(7)\nwhile True: pass</python>")
    assert time.monotonic() - began < 12
    for size in ("3_000_000", "30_000_000"):
        assert 2_000 < len(answer(f"<python>print('x' * {size})</python>")) < 2_200
    assert answer("<python>print(1)</python>") == "<output>1</output>"  # nothing is left over


def test_where_programs_are_not_run_the_rollout_fails():
    class Closed:
        def call(self, task, timeout_s):
            raise RuntimeError("programs are not run: no seccomp")

    with pytest.raises(RuntimeError, match="no seccomp"):
        python_step(Closed(), "math", [{"role": "assistant", "content": "<python>1</python>"}])


def test_a_fenced_program_that_answers_a_problem_of_code_is_no_call():
    class Counting:
        def call(self, task, timeout_s):
            return {"output": "7\n", "why": ""}

    said = [{"role": "assistant", "content": "```python\ndef f(x): return x\n```\n"}]
    assert python_step(Counting(), "code", said) == "" and "7" in python_step(Counting(), "math", said)
    said[0]["content"] = "<python>print(7)</python>"
    assert python_step(Counting(), "code", said) == "<output>7</output>"


@pytest.mark.parametrize("stop", ["</answer>", ("",), (3,)])
def test_strings_that_cannot_end_a_turn_are_refused(monkeypatch, stop):
    own = types.ModuleType("own_environment")
    own.start = lambda problem: None
    own.start.stop = stop
    monkeypatch.setitem(sys.modules, "own_environment", own)
    with pytest.raises(UserError, match="must be a tuple of strings"):
        open_environment("own_environment:start", WorkerPool(1))


def test_the_task_of_the_tool_says_what_the_tool_says(answer):
    for item in [item for item in items("tool", 24, "train", 0) if item.steps]:
        program, output = item.steps[0].split("</python>")
        assert answer(f"{program}</python>") == output == f"<output>{eval(item.key)}</output>"


def test_verifiers_of_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", types.ModuleType("verifiers"))
    with pytest.raises(UserError, match=r"verifiers:wordle.*MultiTurnEnv.*pip install \"verifiers<0.2\""):
        open_environment("verifiers:wordle", WorkerPool(1))


def test_an_environment_of_verifiers_answers_and_scores(monkeypatch):
    """A game of higher and lower, as the package runs it."""
    vf = pytest.importorskip("verifiers", reason='pip install "verifiers<0.2" to run this')
    datasets = pytest.importorskip("datasets")

    class Game(vf.MultiTurnEnv):
        async def setup_state(self, state):
            state["tries"] = 0
            return state

        @vf.stop
        async def found(self, state):
            turns = state["trajectory"]
            return bool(turns) and turns[-1]["completion"][-1]["content"].strip() == state["answer"]

        async def env_response(self, messages, state, **kwargs):
            state["tries"] += 1
            assert [m["role"] for m in messages][-1] == "assistant"
            higher = int(messages[-1]["content"]) < int(state["answer"])
            return [{"role": "user", "content": f"{'higher' if higher else 'lower'} ({state['tries']})"}]

    def score(state, **kwargs):
        return 1.0 / (1 + state["tries"])

    rows = datasets.Dataset.from_list([{"question": "Guess.", "answer": "7"}])
    module = types.ModuleType("game_env")
    module.load_environment = lambda **_: Game(dataset=rows, rubric=vf.Rubric(funcs=[score]), max_turns=9)
    monkeypatch.setitem(sys.modules, "game_env", module)
    found = open_environment("verifiers:game-env", WorkerPool(1))
    step = found.start(Problem("g", "math", "Guess."))
    told, messages = [], [{"role": "user", "content": "Guess."}]
    for guess in ("5", "9", "7"):
        messages.append({"role": "assistant", "content": guess})
        told.append(step(messages))
        messages.append({"role": "user", "content": str(told[-1])})
    assert told == ["higher (1)", "lower (2)", pytest.approx(1 / 3)]
    other = found.start(Problem("h", "math", "Another?", answer="5"))  # states are apart
    assert other([messages[0], {"role": "assistant", "content": "3"}]) == "higher (1)"
