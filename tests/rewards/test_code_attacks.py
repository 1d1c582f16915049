"""Programs that try to pass without being right, or to harm the host: none passes, nothing is left of them."""  # noqa: E501

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rewards.code import run_tests, sandbox_in_force
from rewards.workers import WorkerPool
from rollout.types import StdioTest
from tests.rewards.in_time import outcomes_in_time

ROOT = Path(__file__).resolve().parents[2]
# Each way in which a test can look at an answer; every one must need the right value.
TESTS = (
    "assert f(1) == 2", "assert abs(f(2) - 3) < 1e-6", "assert f(5) in (6,)", "assert 7 in [f(6)]",
    "assert [f(1), f(2)] == [2, 3]", "assert round(f(1)) == 2", "assert sum([f(7), 0]) == 8", "assert str(f(98)) == '99'",  # noqa: E501
)  # fmt: skip
SEND = (
    "import os, struct, json\n"
    "def send(m):\n    d = json.dumps(m).encode(); os.write(3, struct.pack('>I', len(d)) + d)\n"
)
FORGERIES = {
    "equal to everything": "class X:\n  __eq__ = __lt__ = __le__ = __gt__ = __contains__ = lambda s, o: True\n"  # noqa: E501
    "  __hash__ = lambda s: 2\n  __sub__ = __rsub__ = __add__ = __radd__ = lambda s, o: 0\n"
    "  __abs__ = __round__ = __int__ = __index__ = lambda s, *a: 2\n  __float__ = lambda s: 2.0\n"
    "  __str__ = __repr__ = lambda s: 'x'\n  __class__ = int\ndef f(x): return X()",
    "a float that is always equal": "class F(float):\n  __eq__ = lambda s, o: True\n  __sub__ = lambda s, o: 0.0\n"  # noqa: E501
    "  __hash__ = float.__hash__\ndef f(x): return F(990)",
    "an int that is always equal": "class F(int):\n  __eq__ = lambda s, o: True\n  __index__ = lambda s: 2\n"
    "  __int__ = __index__\n  __hash__ = int.__hash__\ndef f(x): return F(990)",
    "a list that holds everything": "class L(list):\n  __eq__ = __contains__ = lambda s, o: True\ndef f(x): return L()",  # noqa: E501
    "searches the frames": "import sys, re\ndef f(x):\n  frame, seen = sys._getframe(), ''\n  while frame:\n"
    "    seen += repr(frame.f_locals) + repr(frame.f_code.co_consts); frame = frame.f_back\n"
    "  found = re.search(r'f\\(%d\\)\\D+(\\d+)' % x, seen)\n  return int(found[1])",
    "searches the heap": "import gc, re\ndef f(x):\n  for o in gc.get_objects():\n    if 'assert f' in repr(o): return 2",  # noqa: E501
    "reads its memory": "import re\ndef f(x):\n  data = open('/proc/self/mem', 'rb')\n  return 2",
    "reads the parent's": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')\ndef f(x): return 990",
    "answers without being asked": SEND + "def f(x):\n  for _ in range(99): send(['value', None])",
    "calls the tests' objects": SEND + "def f(x):\n  send(['own', 0, '__globals__', [], []])",
    "sends a function": SEND + "def f(x): send(['value', ['n', 'builtins', 'exec']])",
    "sends nonsense": "import os\ndef f(x): os.write(3, b'\\xff' * 64)",
    "says it passed": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'8 passed')\n  except OSError: pass\n",  # noqa: E501
    "patches assertions": "import builtins\nbuiltins.AssertionError = builtins.BaseException = int\n"
    "builtins.abs = builtins.round = abs = round = sum = len = lambda *a: 2\ndef f(x): return 990",
    "patches the judge": "import sys\nfor m in list(sys.modules.values()):\n"
    "  for n in ('judge', 'exec', 'decode'): m.__dict__[n] = lambda *a: None\ndef f(x): return 990",
    "exits at once": "import sys\nsys.exit(0)",
    "exits when called": "import sys\ndef f(x): sys.exit(0)",
    "leaves when called": "import os\ndef f(x): os._exit(0)",
    "leaves at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "closes everything": "import os\nos.closerange(0, 64)\ndef f(x): return 990",
    "returns itself": "def f(*x): return f",
    "returns a cycle": "def f(x):\n  a = []; a.append(a); return a",
    "returns everything": "import itertools\ndef f(x): return itertools.count()",
    "reads the data set": "import glob\nfor n in glob.glob('/**/humaneval.jsonl', recursive=True): open(n)\nopen('/etc/passwd')",  # noqa: E501
}
HARMFUL = {
    "loop": "while True: pass",
    "loop in f": "def f(x):\n  while True: pass",
    "loop that catches all": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb, raw": "import _posixsubprocess as p\nwhile True: p.fork_exec([b'/bin/sh'], [b'/bin/sh'], True, (3,), None, None,"  # noqa: E501
    " -1, -1, -1, -1, -1, -1, 5, 6, False, False, 0, None, None, None, -1, None, False)",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory": "x = [0] * 10**10",
    "memory, step by step": "x = []\nwhile True: x.append(bytes(10**7))",
    "a large answer": "def f(x): return 'x' * 10**9",
    "colliding hashes": "def f(x): return set(range(0, 10**5 * (2**61 - 1), 2**61 - 1))",
    "output": "while True: print('x' * 99999)",
    "fills its folder": "i = 0\nwhile True:\n  open(str(i), 'wb').write(bytes(10**7)); i += 1\n  if i > 20: i = 0",  # noqa: E501
    "deep folders": "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\n",
    "locked folders": "import os\nos.mkdir('d'); open('d/x', 'w'); os.chmod('d', 0)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills everybody": "import os\nos.kill(-1, 9)",
    "kills itself": "import signal\nsignal.raise_signal(9)",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "socket, raw": "import _socket\n_socket.socket()",
    "ctypes": "import ctypes\nctypes.CDLL(None).fork()",
    "writes outside": "open('/tmp/r1-written', 'w')",
    "segfault": "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1)\ng(0)",
}  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        sandbox_in_force(pool)
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
    before = set(os.listdir(tempfile.gettempdir()))
    for number in range(120):
        outcome = run_tests(quick[number % len(quick)] + f"\n# {number}", TESTS, timeout_s=2, pool=pool)
        assert outcome.value == 0
    assert run_tests("def f(x): return x + 1", TESTS, pool=pool).value == 1
    (worker,) = pool.pids()
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    assert len(children) == 1  # the zygote
    assert not Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
    assert not [n for n in set(os.listdir(tempfile.gettempdir())) - before if n.startswith("program-")]


def outlasting(name: str) -> bool:
    """Whether an attack takes its whole time limit."""
    slow = (
        "loop",
        "bomb",
        "memory",
        "large",
        "colliding",
        "output",
        "fills",
        "folders",
        "threads",
        "seg",
        "every",
    )
    return any(word in name for word in slow)


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


def test_without_namespaces_the_rest_still_holds(tmp_path):
    """Where the kernel gives neither namespaces nor seccomp, it says so, and no attack of these passes."""
    script = (
        "import json, sys\nfrom rewards import confine, sandbox\n"
        "confine.enter = lambda project: setattr(confine.in_force, 'why_not', 'taken away by the test')\n"
        "said = sandbox.warm()\n"  # forks the zygote, which must not have seen a test
        "programs, tests = json.loads(sys.stdin.read())\n"
        "limits = sandbox.Limits(timeout_s=2)\n"
        "out = [sandbox.run_asserts(p, tests, limits, False)['passed'] for p in programs]\n"
        "out.append(sandbox.run_stdio('print(int(input()) * 2)', [['2', '4']], limits, True)['passed'])\n"
        "print(json.dumps([said, out]))\n"
    )
    programs = [text for name, text in {**FORGERIES, **HARMFUL}.items() if not outlasting(name)]
    right = "def f(x): return x + 1"
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps([[*programs, right], TESTS]), env=env, capture_output=True, text=True,  # noqa: E501
        timeout=100, check=True,
    )  # fmt: skip
    said, passed = json.loads(done.stdout)
    assert said == "rlimits, audit hook; no namespaces: taken away by the test"
    assert passed == [0] * len(programs) + [len(TESTS), 1]
    assert os.listdir(tmp_path) == []


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
