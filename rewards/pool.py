"""A pool of warm child processes for work that may hang, leak or crash.

Each child is a light interpreter of its own (`python -m rewards.worker`), never a fork of the trainer:
forking a process that holds torch's threads or a CUDA context is unsafe. A request and its reply are JSON
behind a four-byte length. The parent holds the clock: a child that is late, dead or out of memory is killed
and replaced, and only its task fails. Any thread may call; each call has a child to itself.
"""

import atexit
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from rewards import wire

START_LIMIT_S = 60.0  # an import of sympy on a busy machine; not part of a task's own limit
DEFAULT_LIMIT_S = 5.0
CHILD_MEMORY_BYTES = 2 << 30

T = TypeVar("T")


class TaskFailed(Exception):
    """The task got no reply: by its `kind`, `time` or `memory` ran out, or its child `died` or `raised`.

    Mathematics only: `stage` is the last that was reached (see `rewards.maths.engine`), and `cpu_s` the CPU
    seconds spent in it, where its time ran out.
    """

    def __init__(self, message: str, kind: str = "raised", stage: str = "", cpu_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.stage, self.cpu_s = kind, stage, cpu_s


class WorkerPool:
    """Up to `size` children, started when first needed, each running one task at a time.

    `size` is min(2, cpus) unless set. `memory_bytes` is a child's address space; programs under test have
    their own, smaller limit.
    """

    def __init__(self, size: int | None = None, memory_bytes: int = CHILD_MEMORY_BYTES) -> None:
        self.size = size or min(2, os.cpu_count() or 1)
        self.memory_bytes = memory_bytes
        self._slots = threading.Semaphore(self.size)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._closed = False
        self._owner = os.getpid()
        atexit.register(self.close)

    def call(self, task: dict[str, Any], timeout_s: float = DEFAULT_LIMIT_S) -> dict[str, Any]:
        """Run `task` (`{"op": …}`, see `rewards.worker`) in a child within `timeout_s` seconds of wall clock.

        Raises `TaskFailed`, or RuntimeError where the pool is closed or was inherited through a fork.
        """
        with self._slots:
            child = self._checkout()
            try:
                child.prepare(task["op"])
                reply = child.exchange(task, timeout_s)
            except BaseException:
                with self._lock:
                    self._children.discard(child)
                child.kill()
                raise
            with self._lock:
                if not self._closed:
                    self._idle.append(child)
        if "error" in reply:
            details = {key: reply[key] for key in ("kind", "stage", "cpu_s") if key in reply}
            raise TaskFailed(str(reply["error"]), **details)
        return reply

    def pids(self) -> list[int]:
        """Process ids of the children that are running now."""
        with self._lock:
            return sorted(child.process.pid for child in self._children)

    def close(self) -> None:
        """Kill every child and wait for it. Tasks under way fail; a second call does nothing."""
        if self._owner != os.getpid():
            return  # inherited through a fork: the children are the parent's
        with self._lock:
            self._closed = True
            children, self._children, self._idle = self._children, set(), []
        for child in children:
            child.kill()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checkout(self) -> "_Child":
        with self._lock:
            if self._closed or self._owner != os.getpid():
                raise RuntimeError("This WorkerPool is closed, or inherited through a fork: make a new one.")
            while self._idle:
                child = self._idle.pop()
                if child.process.poll() is None:
                    return child
                self._children.discard(child)
                child.kill()  # died while idle; this closes its pipes
            child = _Child(self.memory_bytes)
            self._children.add(child)
            return child


class _Child:
    """One child process and its two pipes."""

    def __init__(self, memory_bytes: int) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        self._folder = tempfile.mkdtemp(prefix="r1-worker-")  # deleted here, since a killed child leaves it
        # Nothing of the trainer's environment reaches a child; a fixed hash seed keeps verdicts repeatable.
        environment = {"PATH": os.defpath, "PYTHONPATH": root, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
        environment["TMPDIR"] = self._folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rewards.worker", str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # the parent handles Ctrl-C
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        os.set_blocking(self._in.fileno(), False)
        os.set_blocking(self._out.fileno(), False)
        self._loaded: set[str] = set()

    def prepare(self, op: str) -> None:
        """Let the child import what `op` needs, once, on a clock of its own."""
        if op not in self._loaded:
            self.exchange({"op": "load", "for": op}, START_LIMIT_S)
            self._loaded.add(op)

    def exchange(self, task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        try:
            self._write(wire.frame(task), deadline)
            reply: dict[str, Any] = wire.receive(lambda length: self._read(length, deadline))
        except TimeoutError:
            raise TaskFailed(f"time ran out: no reply within {timeout_s:g} s", "time") from None
        except (EOFError, BrokenPipeError):
            raise self._death() from None
        return reply

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self._in.close()
        self._out.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _await(self._in.fileno(), select.POLLOUT, deadline)
            with suppress(BlockingIOError):
                view = view[os.write(self._in.fileno(), view[:65536]) :]

    def _read(self, length: int, deadline: float) -> bytes:
        _await(self._out.fileno(), select.POLLIN, deadline)
        return os.read(self._out.fileno(), length)

    def _death(self) -> TaskFailed:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        return TaskFailed(f"the worker process died ({how})", "died")


def _await(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(1000 * left):
        raise TimeoutError


class Memo(Generic[T]):
    """The last `size` results used, by key, shared by threads; `keep` decides which are kept."""

    def __init__(self, size: int, keep: Callable[[T], bool]) -> None:
        self._size, self._keep = size, keep
        self._results: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The remembered result for `key`, or a fresh one. Two threads may compute the same key at once."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
        result = compute()
        if self._keep(result):
            with self._lock:
                self._results[key] = result
                while len(self._results) > self._size:
                    self._results.popitem(last=False)
        return result

    def clear(self) -> None:
        with self._lock:
            self._results.clear()


_shared: WorkerPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> WorkerPool:
    """The process's own pool, made at the first call and closed at exit."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared._closed:
            _shared = WorkerPool()
        return _shared


def _forget_in_fork() -> None:
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_in_fork)
