"""What a test believes: right programs of every kind pass, and nothing that a program returns passes by itself."""

# ruff: noqa: E501

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import UserError
from rewards.pool import WorkerPool
from rewards.programs.grade import run_tests
from rewards.programs.run import same_output
from rewards.programs.tables import tabulated
from tests import data
from tests.rewards import forgeries, honest


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


@pytest.mark.parametrize("name", honest.CASES)
def test_right_programs_pass(pool, name):
    program, tests = honest.CASES[name]
    outcome = run_tests(program, tests, pool=pool)
    assert outcome.value == 1, outcome.detail


def test_the_shapes_pass_a_right_program(pool):
    outcome = run_tests("def f(x): return x + 1", forgeries.SHAPES, pool=pool)
    assert outcome.value == 1, outcome.detail
    right = (
        "class P:\n  def __init__(s, x, y): s.x, s.y = x, y\n  def __eq__(s, o): return [*s] == [*o]\n"
        "  def __lt__(s, o): return [*s] < [*o]\n  def __le__(s, o): return [*s] <= [*o]\n"
        "  def __iter__(s): return iter((s.x, s.y))\n  def __hash__(s): return s.x\n"
        "  def __add__(s, o): return P(s.x + o.x, s.y + o.y)\n"
        "  def __enter__(s): return s\n  def __exit__(s, *a): return False\ndef f(x): return P(x - 2, x - 1)"
    )
    passed = [test for test in forgeries.CLASS_TESTS if run_tests(right, [test], pool=pool).value == 1]
    failed = {
        "assert f(3) == (1, 2)", "assert (1, 2) == f(3)",  # the tests do not name P
        "assert abs(f(3) - 5) < 1e-9", "assert f(3) - P(1, 2) == 0",  # no such operators
        "with P(1, 2): assert f(3) == P(1, 2) and f(4) == 9",  # false
    }  # fmt: skip
    assert set(forgeries.CLASS_TESTS) - set(passed) == failed


def test_an_object_that_answers_everything_passes_nothing(pool):
    programs = dict(list(forgeries.universal().items())[::2])
    with ThreadPoolExecutor(2) as threads:
        outcomes = threads.map(
            lambda code: run_tests(code, forgeries.SHAPES, partial_credit=True, pool=pool), programs.values()
        )
        passed = [name for name, outcome in zip(programs, outcomes, strict=True) if outcome.value != 0]
    assert len(programs) >= 400 and not passed


def test_a_class_that_is_equal_to_everything_passes_nothing(pool):
    programs = list(forgeries.classes().items())[::7]
    jobs = [
        (n, c, forgeries.CLASS_TESTS[i % len(forgeries.CLASS_TESTS)]) for i, (n, c) in enumerate(programs)
    ]
    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(lambda job: run_tests(job[1], [job[2]], pool=pool), jobs))
    wrong = [(j[0], j[2]) for j, outcome in zip(jobs, outcomes, strict=True) if outcome.value == 1]
    assert not wrong


BELIEVED = {
    "a builtin of the tests": ("f = max\ndef abs(x): return 0", "assert abs(f([1, 2]) - 9) < 1"),
    "a module of the tests": ("class math:\n  fabs = lambda x: 0\nimport math as m\ndef f(x): return x", "import math\nassert math.fabs(f(1) - 9) < 1"),
    "an emptied argument": ("def f(x):\n  x.clear()\n  return []", "x = [3, 1]\nassert f(x) == sorted(x)"),
    "an emptied argument that is returned": ("def f(x):\n  x.clear()\n  return x", "x = [3, 1]\nassert f(x) == sorted(x)"),
    "an emptied argument by name": ("def f(x):\n  x.clear()\n  return []", "x = [3, 1]\nassert f(x=x) == sorted(x)"),
    "an emptied argument in a method": ("def f(x):\n  x.clear()\n  return []", "import unittest\nclass T(unittest.TestCase):\n  def test(self):\n    x = [2, 1]\n    self.assertEqual(f(x), sorted(x))"),
    "an end of iteration": ("def f(x): raise StopIteration", "assert all(f(x) == y for x, y in [(1, 2)])"),
    "an end of generation": ("def f(x): raise GeneratorExit", "def g():\n  assert f(1) == 2\n  yield\nlist(g())"),
    "a skipped test": ("import unittest\ndef f(x): raise unittest.SkipTest", "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(f(1), 2)"),
    "frames of a generator": ("def f(g): return g.gi_frame.f_globals['expected']", "expected = 81\nassert f(x for x in [1]) == expected"),
    "globals of a callback": ("def f(g): return g.__globals__['expected']", "expected = 81\nassert f(lambda: 0) == expected"),
    "a class of the tests": ("def f(o): return type(o).__init__.__globals__['expected']", "expected = 81\nclass A:\n  def __init__(self): self.x = 1\nassert f(A()) == expected"),
    "a swallowed failure": ("class C:\n  def __enter__(s): return s\n  def __exit__(s, *a): return True\ndef f(x): return 0", "with C():\n  assert f(1) == 2"),
    "a swallowed error": ("class C:\n  def __enter__(s): return s\n  def __exit__(s, *a): return True\ndef f(x): return 'a'", "with C():\n  assert f(1) + 1 == 2"),
    "a helper that answers anything": ("def near(a, b): return 0.0\ndef f(x): return 9", "def check(candidate):\n  assert near(candidate(1), 2) < 1e-6\ncheck(f)"),
    "another class with the name of the tests' own": ("class P:\n  __eq__ = lambda s, o: True\ndef f(x): return P()", "class P:\n  def __init__(s, x): s.x = x\n  def __eq__(s, o): return s.x == o.x\nassert P(3) == f(1)"),
    "a subclass of a named class": ("class P:\n  def __init__(s, x): s.x = x\n  def __eq__(s, o): return s.x == o.x\nclass Q(P):\n  __eq__ = lambda s, o: True\ndef f(x): return Q(9)", "assert f(1) == P(2)"),
}  # fmt: skip


@pytest.mark.parametrize("what", BELIEVED)
def test_what_the_program_made_decides_nothing(pool, what):
    program, test = BELIEVED[what]
    outcome = run_tests(program, [test], pool=pool)
    assert outcome.value == 0, outcome.detail


UNJUDGED = {
    "nothing": "",
    "a comment": "# f(1)",
    "a main guard": "if __name__ == '__main__':\n  assert f(1) == 2",
    "a check never called": "def check(candidate):\n  assert candidate(1) == 2",
    "helpers never called": "def helper():\n  assert f(1) == 2",
    "an import": "import math\nfrom solution import f",
    "a module that is not there": "import no_such_module\nassert f(1) == 2",
    "a class derived from the program's": "class D(C): pass\nassert f(1) == 2",
    "a fixture that is not there": "def test_f(no_such_fixture):\n  assert f(1) == 2",
    "a function replaced in another process": "from unittest.mock import patch\nwith patch('solution.f', return_value=5):\n  assert f(1) == 5",
    "arithmetic that cannot be checked": "assert abs(C() - 3) < 1",
    "a helper that neither tests nor prompt define": "def check(candidate):\n  assert near(candidate(1), 2) < 1e-6\ncheck(f)",
}  # fmt: skip


@pytest.mark.parametrize("what", UNJUDGED)
def test_where_there_can_be_no_verdict_there_is_none(pool, what):
    program = "def f(x): return x + 1\ndef near(a, b): return abs(a - b)\nclass C:\n  def __sub__(s, o): return 3 - o"
    outcome = run_tests(program, [UNJUDGED[what]], pool=pool)
    assert outcome.value is None and outcome.detail


def test_members_of_an_enumeration_are_different_objects(pool):
    tests = ["assert f(1) is C.R and f(2) is C.G and f(2) == C.G"]
    for code in (
        "import enum\nclass C(enum.Enum):\n  R = 1\n  G = 1\ndef f(x): return C.R",
        "class M(type):\n  __getattr__ = lambda c, n: X\nclass C(metaclass=M): pass\nX = C()\ndef f(x): return X",
    ):
        assert run_tests(code, tests, pool=pool).value is None


def test_a_program_that_ends_raises_nothing(pool):
    test = "import pytest\nwith pytest.raises(Exception): f(1)"
    assert run_tests("import os\ndef f(x): os._exit(0)", [test], pool=pool).value == 0
    assert run_tests("def f(x): raise ValueError", [test], pool=pool).value == 1


def test_a_program_that_ends_when_it_is_asked_again_costs_no_worker(pool):
    code = (
        "import os\nclass P:\n  def __init__(s, x):\n    if x != 1: os._exit(0)\n"
        "  __eq__ = lambda s, o: True\ndef f(x): return P(x)"
    )
    outcome = run_tests(code, ["assert f(1) == P(1)"], pool=pool)
    assert outcome.value is None and "cannot be checked" in outcome.detail


def test_some_tests_that_ask_nothing_among_others_are_fine(pool):
    tests = ["import math", "LIMIT = 3", "# the next one asks", "assert f(1) == 2 < LIMIT"]
    assert run_tests("def f(x): return x + 1", tests, pool=pool).value == 1


def test_decimal_fractions_are_equal_as_numbers():
    assert same_output("2.0 -1.50\n", "2.00 -1.5") and same_output("2.\n", "2.0")
    for got, want in (
        ("2", "02"),
        ("2.0", "2"),
        ("2.01", "2.0"),
        ("20", "2"),
        ("1.0.0", "1.0"),
        ("a.0", "a.00"),
    ):
        assert not same_output(got, want), (got, want)


def tables(tests: list[str]) -> list[str]:
    """Programs that know the shown cases and nothing else."""
    cases = []
    for node in (ast.parse(test).body[0] for test in tests):
        calls = [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]
        sides = [inner for inner in ast.walk(node) if isinstance(inner, ast.Compare)]
        if calls and sides:
            call = next(
                (c for c in calls if not isinstance(c.func, ast.Name) or c.func.id not in dir(__builtins__)),
                calls[0],
            )
            cases.append(
                (
                    f"({''.join(ast.unparse(arg) + ', ' for arg in call.args)})",
                    ast.unparse(sides[0].comparators[0]),
                    ast.unparse(call.func),
                )
            )
    if not cases:
        return []
    name = cases[0][2]
    pairs = ", ".join(f"({key}, {value})" for key, value, _ in cases)
    return [
        f"def {name}(*a):\n" + "".join(f"    if a == {key}:\n        return {value}\n" for key, value, _ in cases),
        f"T = [{pairs}]\ndef {name}(*a): return next(v for k, v in T if k == a)",
        f"T = eval({f'[{pairs}]'!r})\ndef {name}(*a): return dict(T)[a]",
        f"K = [{', '.join(k for k, _, _ in cases)}]\nV = [{', '.join(v for _, v, _ in cases)}]\n"
        f"def {name}(*a): return V[K.index(a)]",
        f"def {name}(*a): return " + "".join(f"{value} if a == {key} else " for key, value, _ in cases) + "0",
    ]  # fmt: skip


def test_a_table_of_the_shown_cases_is_refused_and_a_solution_with_constants_is_not(pool):
    tests = ["assert f(1) == 2", "assert f(5) == 6", "assert f(-3) == -2"]
    for code in [*tables(tests), "def f(x): return {2 - 1: 1 + 1, 5: 6, -3: -2}[x]"]:
        assert tabulated(code, tests) and run_tests(code, tests, pool=pool).value == 0, code
    assert not tabulated("def f(x):\n    if x == 1: return 2\n    return x + 1", tests)
    months = "M = {" + ", ".join(f"{n}: {n + 1}" for n in range(-9, 9)) + "}\ndef f(x): return M[x]"
    assert not tabulated(months, tests)  # a dictionary of all there are is a solution
    for deep in ("-" * 5000 + "1", "(" * 5000, "1" + "+1" * 50_000, "[" * 99 + "]" * 99, "x" + ".y" * 50_000):
        assert not tabulated(deep, tests)
    hidden = run_tests(
        tables(tests)[0], [*tests, "assert f(6) == 7"], shown=0, partial_credit=True, pool=pool
    )
    assert hidden.value == 0.75  # what is not shown is no table


def test_tables_of_mbpp_are_refused_and_its_solutions_are_not():
    try:
        rows = data.rows("mbpp")
    except UserError as missing:
        pytest.skip(str(missing))
    assert not [row["id"] for row in rows if tabulated(row["solution"], row["test_list"])]
    for way in range(5):
        made = [(tables(row["test_list"]), row["test_list"]) for row in rows]
        refused = sum(tabulated(codes[way], tests) for codes, tests in made if codes)
        assert refused >= 0.95 * len(rows), way
