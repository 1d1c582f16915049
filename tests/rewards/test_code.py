"""Programs: right, wrong, hostile; and the reference solutions of HumanEval and MBPP."""

import os
import tempfile
import time

import pytest

from pipeline.errors import UserError
from rewards.pool import WorkerPool
from rewards.programs import grade as code_module
from rewards.programs.grade import run_tests
from rollout.types import StdioTest
from tests import data

TESTS = ("assert f(1) == 2", "assert f(2) == 3", "assert f(5) == 6", "assert f(-1) == 0")
RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _fresh():
    code_module._results.clear()


def test_right(pool):
    assert run_tests(RIGHT, TESTS, pool=pool).value == 1
    assert run_tests(RIGHT, TESTS, pool=pool, partial_credit=True).value == 1


def test_partial_credit(pool):
    half = "def f(x):\n    return x + 1 if x > 1 else 7\n"
    assert run_tests(half, TESTS, pool=pool).value == 0
    assert run_tests(half, TESTS, pool=pool, partial_credit=True).value == 0.5


WRONG = {
    "wrong": "def f(x): return x",
    "syntax": "def f(x) return x",
    "raises": "raise ValueError",
    "exit": "import sys\nsys.exit(0)",
    "exit in f": "import sys\ndef f(x): sys.exit(0)",
    "_exit": "import os\nos._exit(0)",
    "_exit in f": "import os\ndef f(x): os._exit(0)",
    "prints passed": "print('passed')\nprint('4 passed')\ndef f(x): return None",
    "writes to every descriptor": "import os\nfor fd in range(64):\n"
    "  try: os.write(fd, b'x 4 passed')\n  except OSError: 0\n"
    "os._exit(0)",
    "patches builtins": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
    "builtins.AssertionError = builtins.BaseException = int\ndef f(x): return None",
    "patches os": "import os\nos.write = os.read = os._exit = lambda *a: b''\ndef f(x): return None",
    "quits while reporting": "def f(x):\n"
    "  raise type('E', (Exception,), {'__str__': lambda s: __import__('os')._exit(0)})",
    "fork": "import os\nos.fork()\n" + RIGHT,
    "subprocess": "import subprocess\nsubprocess.run(['true'])\n" + RIGHT,
    "socket": "import socket\nsocket.socket().connect(('127.0.0.1', 9))\n" + RIGHT,
    "memory": "x = [0] * 10**10\n" + RIGHT,
    "memory, step by step": "x = []\nwhile True: x.append(bytes(10**7))\n" + RIGHT,
    "segfault": "import sys\nsys.setrecursionlimit(10**9)\ng = lambda: repr(a)\na = []\n"
    "for _ in range(10**6): a = [a]\nrepr(a)\n" + RIGHT,
    "kill": "import os, signal\nsignal.raise_signal(9)\n" + RIGHT,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_or_hostile(pool, name):
    outcome = run_tests(WRONG[name], TESTS, timeout_s=3, pool=pool, partial_credit=True)
    assert outcome.value == 0, outcome
    assert outcome.detail


def test_endless_loops_end(pool):
    start = time.perf_counter()
    assert "time ran out" in run_tests("while True: pass", TESTS, timeout_s=0.5, pool=pool).detail
    assert (
        "time ran out"
        in run_tests("while True:\n try:\n  while 1: 0\n except: 0", TESTS, timeout_s=0.5, pool=pool).detail
    )
    flood = run_tests("while True: print('x' * 9999)", [StdioTest("", "")], timeout_s=5, pool=pool)
    assert flood.value == 0 and "printed more" in flood.detail
    assert time.perf_counter() - start < 5
    assert run_tests(RIGHT, TESTS, pool=pool).value == 1


def test_a_verdict_is_remembered_for_its_own_limit_alone(pool):
    slow = "import time\ntime.sleep(0.6)\n" + RIGHT
    assert "time ran out" in run_tests(slow, TESTS, timeout_s=0.3, pool=pool).detail
    assert run_tests(slow, TESTS, timeout_s=10, pool=pool).value == 1


def test_files_stay_in_a_folder_that_is_deleted(pool, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep")
    before = set(os.listdir(tempfile.gettempdir()))
    inside = "import os\nopen('a', 'w').write('1')\nos.mkdir('d')\n"
    inside += "os.rename('a', 'd/a')\nos.remove('d/a')\nos.rmdir('d')\n"
    assert run_tests(inside + RIGHT, TESTS, pool=pool).value == 1
    for attack in (f"open({str(victim)!r}, 'w')", f"import os\nos.remove({str(victim)!r})",
                   f"import shutil\nshutil.rmtree({str(tmp_path)!r})"):  # fmt: skip
        assert "not allowed" in run_tests(attack, TESTS, pool=pool).detail
    assert victim.read_text() == "keep"
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("program-")]


def test_environment_is_scrubbed(pool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with WorkerPool(1) as fresh:
        code = "import os\ndef f(): return dict(os.environ)"
        assert run_tests(code, ["assert 'HF_TOKEN' not in f() and f()"], pool=fresh).value == 1


def test_stdio(pool):
    cases = [StdioTest("2\n", "4\n"), StdioTest("5", "10  \n\n")]
    assert run_tests("print(int(input()) * 2)", cases, pool=pool).value == 1
    assert run_tests("import sys\nprint(int(sys.stdin.read()) * 2)\nsys.exit(0)", cases, pool=pool).value == 1
    assert run_tests("if __name__ == '__main__': print(int(open(0).read()) * 2)", cases, pool=pool).value == 1
    assert run_tests("print(4)", cases, pool=pool, partial_credit=True).value == 0.5
    assert run_tests("print(int(input()) * 2); raise ValueError", cases, pool=pool).value == 0
    assert run_tests("print(2, int(input()) * 2)", cases, pool=pool).value == 0
    assert run_tests("import sys\nsys.exit(1)", [StdioTest("", "")], pool=pool).value == 0


def test_verifier_failures(pool):
    assert run_tests(RIGHT, (), pool=pool).value is None
    assert run_tests(RIGHT, ("assert (",), pool=pool).value is None
    assert run_tests(RIGHT, ("pass", StdioTest("", "")), pool=pool).value is None


def test_verdicts_repeat_and_are_remembered(pool):
    randoms = (
        "import random\nv = [random.random(), hash('a'), list({'b', 'c', 'd'})]\ndef f(): return v\nprint(v)"
    )
    outcome = run_tests(randoms, ["open('x', 'w').write(str(f())); raise ValueError(str(f()))"], pool=pool)
    code_module._results.clear()
    with WorkerPool(1) as fresh:
        again = run_tests(randoms, ["open('x', 'w').write(str(f())); raise ValueError(str(f()))"], pool=fresh)
    assert outcome.detail == again.detail
    slow = "import time\ntime.sleep(0.4)\n" + RIGHT
    run_tests(slow, TESTS, pool=pool)
    start = time.perf_counter()
    run_tests(slow, TESTS, pool=pool)
    assert time.perf_counter() - start < 0.1


def found(read, name: str) -> list:
    try:
        return read(name)
    except UserError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(("name", "every"), [("humaneval", 4), ("mbpp", 24)])
def test_reference_programs_pass_and_broken_ones_do_not(pool, name, every):
    for program, tests in found(data.checked_programs, name)[::every]:
        assert run_tests(program, tests, pool=pool).value == 1, program
        assert run_tests(data.broken(program), tests, pool=pool).value == 0, program


def test_stdio_references_pass(pool):
    for row in found(data.rows, "code_stdio"):
        cases = [StdioTest(case["input"], case["output"]) for case in row["tests"][:4]]
        outcome = run_tests(row["solution"], cases, timeout_s=10, pool=pool)
        assert outcome.value == 1, (row["id"], outcome.detail)
