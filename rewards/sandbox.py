"""Run an untrusted Python program in a fork with limits, and learn honestly whether it passed.

Runs inside `rewards.worker` only. A fork of that warm, single-threaded interpreter costs milliseconds.

The program's process gets: what `rewards.confine` and `rewards.audit` leave it, an empty working folder that
is deleted afterwards, an empty environment, and no open files but its input, its output and, for assert-style
tests, the socket to the judge. On time-out it is killed, and with it every process in its namespace; where
there is none, its process group and then every descendant that tried to hide (the worker is their reaper).

Who decides: stdin/stdout cases are compared here. Assert-style tests run in a process of their own
(`rewards.judge`), which the program cannot reach; only that one holds the pipe that the verdict comes by.
"""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from rewards import audit, confine, judge, serve

LINK_FD = 3
WARM_MODULES = (
    "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools",
    "hashlib", "heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
JUDGE_MEMORY_BYTES = 1 << 30
DETAIL_BYTES = 1 << 16

_parent = -1  # set by `adopt_orphans`


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run of a program may use."""

    timeout_s: float
    """Wall clock, seconds; CPU time is limited to a second more."""
    memory_bytes: int = 1 << 30
    """Address space, the interpreter's own (about 100 MB) included."""
    output_bytes: int = 8 << 20
    """What it may print."""
    file_bytes: int = 16 << 20
    """The largest file it may write."""
    processes: int = 4096
    """Processes and threads of this user; the system does not hold root to it, seccomp and the hook do."""


@dataclass(slots=True)
class _Run:
    """A program that is running, or has run."""

    pid: int
    status: int = 0  # as waitpid gives it
    killed: str = ""  # why we killed it, or ""
    output: dict[int, bytearray] = field(default_factory=dict)  # by descriptor

    def failure(self) -> str:
        """Why there is no result, in words."""
        if self.killed:
            return self.killed
        if os.WIFSIGNALED(self.status):
            return f"killed by {signal.Signals(os.WTERMSIG(self.status)).name}"
        return f"exited with status {os.WEXITSTATUS(self.status)} before the tests had run to the end"


def warm() -> str:
    """Import what programs commonly import, so that a fork finds it there; confine this process.

    Returns:
        What is in force, in words.
    """
    for name in WARM_MODULES:
        import_module(name)
    # Imported at the first exception, comparison or parse otherwise, in every fork anew.
    with suppress(SyntaxError):
        compile("x = 1\nassert x", "warm", "exec")
    confine.enter(Path(__file__).resolve().parent.parent)
    return confine.describe()


def adopt_orphans(parent: int) -> None:
    """Make this process the parent of descendants that lose theirs, so that it can find and kill them.

    `parent` is the pipe from our own parent: when it hangs up, a program that is running is stopped.
    """
    global _parent
    _parent = parent
    confine.reap_orphans()


def run_asserts(code: str, tests: list[str], limits: Limits, stop_early: bool) -> dict[str, Any]:
    """Run the program in one process and the tests on it in another, under one clock.

    Returns:
        `passed`, `total` and a `detail` about the first failure; or `error` where a test does not compile.
    """
    ours, theirs = socket.socketpair()
    with _Scratch() as folder, _nothing() as nothing:
        program = _Run(
            _fork(lambda: serve.serve(LINK_FD, code), nothing, nothing, nothing, folder, limits, theirs.fileno())
        )
        theirs.close()
        try:
            result, judged = _judge(ours, tests, stop_early, limits, program)
        finally:
            _end(program)
    total = len(tests)
    if result.startswith("E "):
        return {"error": result[2:]}
    if not result:
        why = program.killed or judged.failure()
        return {"passed": 0, "total": total, "detail": why}
    passed, _, detail = result.partition(" ")
    if detail.endswith(("the program ended", "the program ended before the tests")) and not program.killed:
        detail += f" ({program.failure()})"
    return {"passed": int(passed), "total": total, "detail": detail}


def _judge(
    ours: socket.socket, tests: list[str], stop_early: bool, limits: Limits, program: _Run
) -> tuple[str, _Run]:
    result_in, result_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_judge(ours.fileno(), result_out, tests, stop_early, limits)
    os.close(result_out)
    ours.close()
    judged = _Run(pid)
    try:
        _collect(judged, [result_in], limits, until_exit=False)
    finally:
        _end(judged, last=False)
        os.close(result_in)
    program.killed = judged.killed
    return judged.output[result_in].decode("utf-8", "replace"), judged


def run_stdio(code: str, cases: list[list[str]], limits: Limits, stop_early: bool) -> dict[str, Any]:
    """Run the program once per `[input, output]` case. After a time-out the rest count as failed."""
    passed, detail = 0, ""
    for number, (given, wanted) in enumerate(cases, 1):
        run, output, errors = _run_once(code, given.encode("utf-8", "surrogatepass"), limits)
        if run.killed or run.status != 0:
            why = run.killed or errors or run.failure()
        elif same_output(output, wanted):
            passed += 1
            continue
        else:
            why = "wrong output"
        detail = detail or f"case {number}: {why}"
        if stop_early or run.killed:
            break
    return {"passed": passed, "total": len(cases), "detail": detail}


def _run_once(code: str, given: bytes, limits: Limits) -> tuple[_Run, str, str]:
    output_in, output_out = os.pipe()
    errors_in, errors_out = os.pipe()
    try:
        with _Scratch() as folder, tempfile.TemporaryFile(dir=folder) as stdin:
            stdin.write(given)
            stdin.seek(0)
            harness = lambda: _stdio_harness(code)  # noqa: E731
            run = _Run(_fork(harness, stdin.fileno(), output_out, errors_out, folder, limits))
            os.close(output_out)
            os.close(errors_out)
            try:
                _collect(run, [output_in, errors_in], limits, until_exit=True)
            finally:
                _end(run)
    finally:
        os.close(output_in)
        os.close(errors_in)
    errors = run.output[errors_in].decode("utf-8", "replace").strip().splitlines()
    return run, run.output[output_in].decode("utf-8", "replace"), errors[-1][:300] if errors else ""


def same_output(got: str, want: str) -> bool:
    """Token by token, line by line; spaces within a line and blank lines at the end do not matter."""
    return [line.split() for line in got.rstrip().splitlines()] == [
        line.split() for line in want.rstrip().splitlines()
    ]


class _Scratch:
    """An empty folder for one program; gone afterwards with all that is in it."""

    def __enter__(self) -> str:
        self._mounted = confine.fresh_scratch()
        self._folder = self._mounted or tempfile.mkdtemp(prefix="program-")
        return self._folder

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            confine.drop_scratch()
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        if os.path.exists(self._folder):  # folders without permissions, or nested too deep for Python
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
            subprocess.run(["chmod", "-R", "u+rwx", self._folder], **quiet)  # type: ignore[call-overload]
            subprocess.run(["rm", "-rf", self._folder], **quiet)  # type: ignore[call-overload]


class _nothing:  # noqa: N801
    """The null device's descriptor."""

    def __enter__(self) -> int:
        self._fd = os.open(os.devnull, os.O_RDWR)
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _collect(run: _Run, pipes: list[int], limits: Limits, *, until_exit: bool) -> None:
    """Read the pipes until the process ends (or only until they close), time is up, or it said too much."""
    deadline = time.monotonic() + limits.timeout_s
    run.output = {fd: bytearray() for fd in pipes}
    poll = select.poll()
    for fd in pipes:
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLIN)
    if _parent >= 0:
        poll.register(_parent, 0)  # no events asked for: only a hang-up is reported
    process = os.pidfd_open(run.pid) if until_exit else -1
    if until_exit:
        poll.register(process, select.POLLIN)
    still_open, ended = len(pipes), False
    try:
        while not run.killed and not ended and (until_exit or still_open):
            left = deadline - time.monotonic()
            ready = poll.poll(1000 * left) if left > 0 else []
            if not ready:
                run.killed = f"time ran out after {limits.timeout_s:g} s"
            for fd, _ in ready:
                if fd == _parent:
                    run.killed = "the parent process is gone"
                elif fd == process:
                    ended = True
                elif not _read_some(run, fd, limits):
                    poll.unregister(fd)
                    still_open -= 1
        for fd in pipes:  # what was left in the pipes when it ended
            while ended and not run.killed and _read_some(run, fd, limits):
                pass
    finally:
        if process >= 0:
            os.close(process)


def _read_some(run: _Run, fd: int, limits: Limits) -> bool:
    """Whether something came; at the end of the stream nothing does."""
    try:
        part = os.read(fd, 1 << 16)
    except BlockingIOError:
        return False
    run.output[fd] += part
    if sum(map(len, run.output.values())) > limits.output_bytes:
        run.killed = f"printed more than {limits.output_bytes} bytes"
    return bool(part)


def _end(run: _Run, *, last: bool = True) -> None:
    """Kill the process and its group, then, if it is the last, every other descendant; note its status."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(run.pid, signal.SIGKILL)
    if not confine.in_force.namespaces:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(run.pid, signal.SIGKILL)
    _, run.status = os.waitpid(run.pid, 0)
    if confine.in_force.namespaces or not last:
        return  # the first process of a namespace takes the others with it
    while orphans := _children():
        for orphan in orphans:
            with suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)


def _children() -> list[int]:
    """Process ids of this process's children (Linux; elsewhere none are found)."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def _become_judge(link: int, result: int, tests: list[str], stop_early: bool, limits: Limits) -> NoReturn:
    """In the fork: keep the two pipes, then run the tests. Never returns."""
    try:
        confine.die_with_parent()
        confine.hide_memory()
        os.setsid()
        _keep((os.open(os.devnull, os.O_RDWR),) * 3 + (link, result))
        sys.stdin, sys.stdout, sys.stderr = (open(os.devnull, mode) for mode in ("r", "w", "w"))  # noqa: SIM115
        confine.limit(int(limits.timeout_s) + 1, JUDGE_MEMORY_BYTES, 0, limits.processes)
        sys.set_int_max_str_digits(0)
        _seed()

        def report(text: str) -> None:
            data = text[:1000].encode("utf-8", "replace")
            os.write(4, data)

        judge.judge(LINK_FD, tests, stop_early, report)
    finally:
        os._exit(0)


def _fork(
    harness: Callable[[], None],
    stdin: int,
    stdout: int,
    stderr: int,
    folder: str,
    limits: Limits,
    link: int | None = None,
) -> int:
    """Fork; the child gives up everything the worker has, then runs `harness`, and never returns."""
    pid = confine.fork_program()
    if pid:
        return pid
    try:
        confine.die_with_parent()
        os.setsid()
        _keep((stdin, stdout, stderr, *([link] if link is not None else [])))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(PATH=os.defpath, HOME=folder, TMPDIR=folder, LANG="C.UTF-8")
        tempfile.tempdir = folder
        sys.argv, sys.path = ["program.py"], [p for p in sys.path if "packages" in p or "lib" in p]
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        _seed()
        cpu = int(limits.timeout_s) + 1
        confine.limit(cpu, limits.memory_bytes, limits.file_bytes, limits.processes)
        confine.give_up_privileges()
        audit.forbid(folder)
        harness()
    finally:
        os._exit(70)


def _keep(wanted: tuple[int, ...]) -> None:
    """Make `wanted` the descriptors 0, 1, 2, … and close all others."""
    import fcntl

    # Above the final numbers first, so that no dup2 overwrites a descriptor still to be moved.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 32) for fd in wanted]
    for target, source in enumerate(high):
        os.dup2(source, target)
    os.closerange(len(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _seed() -> None:
    if random := sys.modules.get("random"):
        random.seed(0)


def _stdio_harness(code: str) -> None:
    leave, words = os._exit, judge.words
    out = sys.stdout
    status: Any = 0
    try:
        exec(compile(code, "program", "exec"), serve.module("__main__"))
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException as error:
        os.write(2, ("\nthe program raised " + words(error)).encode("utf-8", "replace"))
        leave(1)
    with suppress(BaseException):
        sys.stdout.flush()
    with suppress(BaseException):
        out.flush()
    leave(status & 0xFF if isinstance(status, int) else 1)
