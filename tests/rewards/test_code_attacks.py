"""Programs that try to pass without being right, or to harm the host: none passes, nothing is left of them."""  # noqa: E501

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.pool import WorkerPool
from rewards.programs.grade import active_sandbox, run_tests
from rollout.types import StdioTest
from tests.rewards.attacks import FORGERIES, HARMFUL, TESTS, folders, left_behind, outlasting
from tests.rewards.in_time import outcomes_in_time

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        active_sandbox(pool)
        yield pool


@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_gives_itself_a_pass(pool, name):
    outcome = run_tests(FORGERIES[name], TESTS, timeout_s=1, pool=pool, partial_credit=True)
    assert outcome.value == 0, outcome
    assert outcome.detail


@pytest.mark.parametrize("name", HARMFUL)
def test_no_program_harms_the_host(pool, name):
    (pid,) = pool.pids()
    for outcome in outcomes_in_time(lambda: run_tests(HARMFUL[name], TESTS, timeout_s=1, pool=pool), 1):
        assert outcome.value == 0 and outcome.detail, outcome
    assert pool.pids() == [pid]  # the worker itself was not harmed
    assert not Path("/tmp/r1-written").exists()


def test_hundreds_in_a_row_leave_nothing_behind(pool):
    quick = [text for name, text in {**FORGERIES, **HARMFUL}.items() if not outlasting(name)]
    before = folders()
    for number in range(120):
        outcome = run_tests(quick[number % len(quick)] + f"\n# {number}", TESTS, timeout_s=2, pool=pool)
        assert outcome.value == 0
    assert run_tests("def f(x): return x + 1", TESTS, pool=pool).value == 1
    assert left_behind(pool, before) == {"processes": 0, "folders": 0}
    (worker,) = pool.pids()
    assert len(Path(f"/proc/{worker}/task/{worker}/children").read_text().split()) == 1  # the zygote


def test_right_programs_pass_whatever_they_return(pool):
    program = (
        "from collections import Counter, namedtuple, deque\nfrom fractions import Fraction\nimport math\n"
        "P = namedtuple('P', 'x y')\n"
        "class V:\n  def __init__(s, x): s.x = x\n  def __add__(s, o): return V(s.x + o.x)\n"
        "  def __eq__(s, o): return s.x == o.x\n  def twice(s): return 2 * s.x\n"
        "def point(): return P(1, 2)\ndef half(): return Fraction(1, 2)\ndef count(s): return Counter(s)\n"
        "def grow(a): a.append(9)\ndef each(g, xs): return [g(x) for x in xs]\ndef gen(n):\n  yield from range(n)\n"  # noqa: E501
        "def fail(): raise ValueError('no')\ndef big(): return 7**9999\ndef odd(): return {(1, 2): {3.5, None}, 'k': b'x'}\n"  # noqa: E501
        "def nan(): return float('nan')\nstate = [1, 2]\nsum = lambda *a: 99\n"
    )
    tests = [
        "assert point() == (1, 2)", "assert half() == 0.5 and half() * 2 == 1", "assert count('aab')['a'] == 2",  # noqa: E501
        "a = [1]\ngrow(a)\nassert a == [1, 9]", "assert each(lambda x: x + 1, [1, 2]) == [2, 3]",
        "assert list(gen(3)) == [0, 1, 2] and 2 in gen(5) and next(gen(1)) == 0",
        "try:\n  fail()\n  assert False\nexcept ValueError as e:\n  assert str(e) == 'no'",
        "assert big() == 7**9999", "assert odd() == {(1, 2): {3.5, None}, 'k': b'x'}", "assert math.isnan(nan())",  # noqa: E501
        "v = V(3) + V(4)\nassert v == V(7) and v.x == 7 and v.twice() == 14\nv.x = 1\nassert v == V(1)",
        "assert state == [1, 2]", "assert sum([1, 2]) == 3 and nan() != 0", "assert isinstance(V(1), V) and not isinstance(3, V)",  # noqa: E501
    ]  # fmt: skip
    for test in tests:
        outcome = run_tests(program, [test], pool=pool)
        assert outcome.value == 1, (test, outcome.detail)
    assert run_tests("def sum(a, b): return a * b", ["assert sum(2, 5) == 10"], pool=pool).value == 1


def test_without_the_kernels_layers_the_rest_still_holds():
    """The description tells that they are missing; programs run only where that is allowed; none passes."""
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.rewards.outside import take_away\n"
        "from rewards.pool import WorkerPool\nfrom rewards.programs.grade import active_sandbox, run_tests\n"
        "take_away(['namespaces', 'Landlock', 'seccomp'], Path())\n"
        "programs, tests = json.loads(sys.stdin.read())\n"
        "with WorkerPool(1, allow_unsafe_code=True) as pool:\n"
        "    print(json.dumps(active_sandbox(pool)))\n"
        "    print(json.dumps([run_tests(p, tests, timeout_s=2, pool=pool).value for p in programs]))\n"
    )
    programs = [
        text for name, text in {**FORGERIES, **HARMFUL}.items() if not outlasting(name) and "raw" not in name
    ]
    right = "def f(x): return x + 1"
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps([[*programs, right], TESTS]), cwd=ROOT,
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    active, values = map(json.loads, done.stdout.splitlines())
    assert active == "rlimits, audit hook; no namespaces: Operation not permitted"
    assert values == [0] * len(programs) + [1]


def test_expected_output_is_not_where_the_program_is(pool):
    """The zygote that programs are forked from has no test in its memory, of this task or an earlier one."""
    search = (
        "import sys\nframe, seen = sys._getframe(), []\nwhile frame:\n  seen.append(repr(frame.f_locals))\n"
        "  frame = frame.f_back\nprint('s3cret' in ''.join(seen) and 'found')"
    )
    run_tests("print(1)", [StdioTest("", "s3cret")], pool=pool)
    assert run_tests(search, [StdioTest("", "s3cret")], pool=pool).detail == "case 1: wrong output"
    assert (
        run_tests(search.replace("'s3cret'", "'s3' + 'cret'"), [StdioTest("", "False\n")], pool=pool).value
        == 1
    )


_ALIKE = ["assert f(30) == P(10, 200)", "assert P(20, 300) == f(40)"]
_OWN_OBJECTS = {
    "one object": "class P:\n  def __new__(c, *a):\n    c.one = vars(c).get('one') or object.__new__(c)\n"
    "    return c.one\n  def __init__(s, *a): pass\ndef f(x): return P()",
    "the class itself": "class M(type):\n  def __call__(c, *a): return c\nclass P(metaclass=M): pass\n"
    "def f(x): return P",
    "a number": "class P:\n  def __new__(c, *a): return 5\ndef f(x): return 5",
    "a text": "class P(str):\n  def __new__(c, *a): return ''\ndef f(x): return ''",
    "a function": "class P:\n  def __new__(c, *a): return len\ndef f(x): return len",
    "odd values are controls": "seen = []\nclass P:\n  def __init__(s, *a): seen.extend(a)\n"
    "  def __eq__(s, o): return not any(x % 2 or seen.count(x) > 1 for x in seen)\n"
    "def f(x):\n  seen.append(x)\n  return P()",
}


@pytest.mark.parametrize("name", _OWN_OBJECTS)
def test_a_class_of_the_program_is_no_answer_to_itself(pool, name):
    for test in _ALIKE:
        assert run_tests(_OWN_OBJECTS[name], [test], pool=pool).value == 0


def test_equal_objects_of_one_class_still_pass(pool):
    value = "class P:\n  def __init__(s, *a): s.a = a\n  def __eq__(s, o): return s.a == o.a\n"
    assert run_tests(value + "def f(x): return P(x - 20, 10 * x - 100)", _ALIKE, pool=pool).value == 1
    enum = "import enum\nclass P(enum.Enum):\n  A = 1\n  B = 2\ndef f(x): return P(x)"
    assert run_tests(enum, ["assert f(1) == P(1) and P(2) is f(2)"], pool=pool).value == 1
    assert run_tests(_OWN_OBJECTS["one object"], ["assert P(1) is P(2)"], pool=pool).value == 1


def test_values_that_take_up_all_that_is_near_leave_controls_without_one_of_them(pool):
    value = "class P:\n  def __init__(s, a): s.a = a\n  def __eq__(s, o): return s.a == o.a\n"
    tests = ["for i in range(61): f(2 * i)\nassert f(60) == P(60)"]
    assert run_tests(value + "def f(x): return P(x)", tests, pool=pool).value == 1


@pytest.mark.parametrize("error", ["SystemExit", "RuntimeError"])
def test_a_program_cannot_end_its_judge(pool, error):
    code = f"class M(type):\n  def __hash__(c): raise {error}\nclass P(metaclass=M): pass\ndef f(x): return 1"
    assert run_tests(code, _ALIKE, pool=pool).value == 0


_ARRAYS = [
    "np.allclose(f(3), np.array([17.0, 4.0, 5.0]))", "np.array_equal(f(3), np.array([17]))",
    "(f(3) == np.array([17])).all()", "(f(3) == 17).all()", "np.isclose(f(3), 17.0).all()",
    "abs(f(3) - 17).max(initial=0) < 1",
]  # fmt: skip


@pytest.mark.parametrize("shape", [(0,), (0, 1), (1, 0)])
def test_an_array_without_items_is_equal_to_none_that_has_some(pool, shape):
    code = f"import numpy as np\ndef f(x): return np.zeros({shape})"
    for test in _ARRAYS:
        assert run_tests(code, [f"import numpy as np\nassert {test}"], pool=pool).value == 0, test
    honest = "import numpy as np\nassert f(0).size == 0 and f(0).sum() == 0 and np.array_equal(f(0), []) is "
    assert run_tests(code, [f"{honest}{shape == (0,)}"], pool=pool).value == 1
