"""Programs that try to pass without being right, and programs that try to harm the host."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rewards.pool import WorkerPool

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


def outlasting(name: str) -> bool:
    """Whether an attack takes its complete time limit."""
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


def folders() -> set[str]:
    """Programs' folders on disk, where they have no namespace of their own."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("r1-program-")}


def left_behind(pool: WorkerPool, before: set[str]) -> dict[str, int]:
    """Processes and `folders` that are there although no program runs."""
    workers = [_children(worker) for worker in pool.pids()]
    programs = [child for children in workers for at_work in children for child in _children(at_work)]
    more = sum(max(0, len(children) - 1) for children in workers)  # a zygote
    return {"processes": len(programs) + more, "folders": len(folders() - before)}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
