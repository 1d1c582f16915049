"""A pool of warm child processes for work that may hang, leak or crash.

Each child is a light interpreter of its own (`python -m rewards.worker`), never a fork of the trainer:
forking a process that holds torch's threads or a CUDA context is unsafe. A request and its reply are messages
over a socket (`wire`). The parent holds the clock: a child that is late, dead or out of memory is killed and
replaced. A death is not the task's doing until it happens twice: the task is run again once, and then fails.
Any thread may call; each call has a child to itself.

`concurrent.futures` cannot stop a task that hangs. pebble over forkserver can, but a child of a forkserver
imports the user's `__main__` again, inherits the trainer's environment, and spins on after a `kill -9` of its
parent.
"""

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

from rewards.fork import remove
from rewards.wire import Channel

START_LIMIT_S = 60.0  # of a worker on a busy machine; not part of a task's own limit
DEFAULT_LIMIT_S = 5.0

T = TypeVar("T")


class TaskFailed(Exception):
    """The task got no verdict: by its `kind`, `time` ran out, its child `died`, or it `raised`."""

    def __init__(self, message: str, kind: str = "raised") -> None:
        super().__init__(message)
        self.kind = kind


class WorkerPool:
    """Up to `size` children, started when first needed, each running one task at a time.

    Args:
        size: Default min(2, cpus).
        allow_unsafe_code: Run programs too where the kernel cannot confine them (`isolate.gap`).
    """

    def __init__(self, size: int | None = None, allow_unsafe_code: bool = False) -> None:
        self.size = size or min(2, os.cpu_count() or 1)
        self._arguments = ["unsafe"] if allow_unsafe_code else []
        self._slots = threading.Semaphore(self.size)
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="rewards")
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._closed = False
        self._owner = os.getpid()
        atexit.register(self.close)

    def submit(self, function: Callable[..., T], *args: Any) -> "Future[T]":
        """Run `function`, which calls this pool, in a thread; `close` cancels those that have not begun."""
        return self._threads.submit(function, *args)

    def call(self, task: dict[str, Any], timeout_s: float = DEFAULT_LIMIT_S) -> dict[str, Any]:
        """Run `task` (`{"op": …}`, see `rewards.worker`) in a child within `timeout_s` seconds of wall clock.

        Raises `TaskFailed`, or RuntimeError where the pool is closed or was inherited through a fork."""
        with self._slots:
            try:
                return self._call(task, timeout_s)
            except TaskFailed as failure:
                if failure.kind != "died":
                    raise
            return self._call(task, timeout_s)

    def _call(self, task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        child = self._checkout()
        try:
            reply = child.exchange(task, timeout_s)
        except BaseException:
            self._discard(child)
            raise
        with self._lock:
            keep = not self._closed and reply.get("kind") != "died"
            if keep:
                self._idle.append(child)
        if not keep:
            self._discard(child)
        if "error" in reply:
            raise TaskFailed(str(reply["error"]), reply.get("kind", "raised"))
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
            idle, self._idle = self._idle, []
            busy = self._children.difference(idle)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in busy:
            child.end()  # the thread that waits for its reply does the rest
        for child in idle:
            self._discard(child)
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
                child.close()  # died while idle
            try:
                child = _Child(self._arguments)
            except OSError as error:
                raise TaskFailed(f"a worker process cannot be started: {error}") from error
            self._children.add(child)
            return child

    def _discard(self, child: "_Child") -> None:
        with self._lock:
            self._children.discard(child)
        child.close()


class _Child:
    """One child process and the socket to it."""

    def __init__(self, arguments: list[str]) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        # Nothing of the trainer's environment reaches a child; a fixed hash seed keeps verdicts repeatable.
        environment = {"PATH": os.defpath, "PYTHONPATH": root, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
        # Made by the child where a program needs it, and deleted here too, since a killed child leaves it.
        self._scratch = os.path.join(tempfile.gettempdir(), f"r1-program-{secrets.token_hex(8)}")
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours.detach())
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.worker", self._scratch, *arguments],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # the parent handles Ctrl-C
            )
        self._warm = False

    def exchange(self, task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply; the first time the child gets ready before, on a clock of its own."""
        if not self._warm:
            self._warm = True
            self.exchange({"op": "load"}, START_LIMIT_S)
        deadline = time.monotonic() + timeout_s
        try:
            self._channel.send(task, deadline)
            reply: dict[str, Any] = self._channel.receive(deadline)
        except TimeoutError:
            raise TaskFailed(f"time ran out: no reply within {timeout_s:g} s", "time") from None
        except EOFError:
            raise self._death() from None
        return reply

    def end(self) -> None:
        """Kill it, and delete what its program left."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        remove(self._scratch)

    def close(self) -> None:
        """`end`, and close the socket, which no other thread may be waiting on."""
        self.end()
        self._channel.close()

    def _death(self) -> TaskFailed:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        return TaskFailed(f"the worker process died ({how})", "died")


@cache
def _pool_of(process: int) -> WorkerPool:
    """A fork makes its own: its parent's children answer its parent."""
    return WorkerPool()


def shared_pool() -> WorkerPool:
    """The process's own pool, made at the first call and closed at exit."""
    return _pool_of(os.getpid())
