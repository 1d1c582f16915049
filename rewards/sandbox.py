"""Run an untrusted Python program in a fork with limits, and learn honestly whether it passed.

Runs inside `rewards.worker` only. A fork of that warm, single-threaded interpreter costs milliseconds.

The child gets: a session of its own, limits on CPU, address space, file size, processes and core dumps, an
empty working folder that is deleted afterwards, an empty environment, and no open files but its input,
output and the result pipe. On time-out the process group is killed, then every descendant that tried to
hide from it (the worker is their reaper).

Defended: endless loops, memory bombs, huge output, fork, `sys.exit(0)`, `os._exit(0)`, a signal, printing
"passed", patching builtins or `os`, and writing, deleting or connecting outside the working folder by way of
Python's own functions (an audit hook). Assert-style tests pass only if the harness, after the last one,
reports a nonce that is not in the process's memory before then; stdin/stdout cases are compared here,
outside the program.

Not defended: a program written against this very file (it can read the nonce's pipe, or walk the frames);
values whose `__eq__` always says yes; native code that makes system calls the audit hook does not see;
reading files. Namespaces and seccomp would close these.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
SECRET_FD, RESULT_FD = 3, 4
WARM_MODULES = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
STACK_BYTES = 64 << 20  # deep recursion is a legitimate way to write a solution

_parent = -1  # set by `adopt_orphans`
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


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
    """Processes and threads of this user; the system does not hold root to it, the audit hook does."""


@dataclass(frozen=True, slots=True)
class _Finished:
    """How a run ended."""

    result: str | None  # what the harness reported, if its nonce was right
    output: bytes
    status: int  # as waitpid gives it
    killed: str  # why we killed it, or ""

    def failure(self) -> str:
        """Why there is no result, in words."""
        if self.killed:
            return self.killed
        if os.WIFSIGNALED(self.status):
            return f"killed by {signal.Signals(os.WTERMSIG(self.status)).name}"
        return f"exited with status {os.WEXITSTATUS(self.status)} before the tests had run to the end"


def warm() -> None:
    """Import what programs commonly import, so that a fork finds it there."""
    for name in WARM_MODULES:
        import_module(name)


def adopt_orphans(parent: int) -> None:
    """Make this process the parent of descendants that lose theirs, so that it can find and kill them.

    `parent` is the pipe from our own parent: when it hangs up, a program that is running is stopped.
    """
    global _parent
    _parent = parent
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_asserts(code: str, tests: list[str], limits: Limits, stop_early: bool) -> dict[str, Any]:
    """Run the program, then each test in its namespace, all in one process under one clock.

    Returns:
        `passed`, `total` and a `detail` about the first failure; or `error` where a test does not compile.
    """
    for number, test in enumerate(tests, 1):
        try:
            compile(test, f"test {number}", "exec")
        except (SyntaxError, ValueError) as error:
            return {"error": f"test {number} does not compile: {error}"}
    done = _run(lambda: _assert_harness(code, tests, stop_early), b"", limits)
    if done.result is None:
        return {"passed": 0, "total": len(tests), "detail": done.failure()}
    passed, _, detail = done.result.partition(" ")
    return {"passed": int(passed), "total": len(tests), "detail": detail}


def run_stdio(code: str, cases: list[list[str]], limits: Limits, stop_early: bool) -> dict[str, Any]:
    """Run the program once per `[input, output]` case. After a time-out the rest count as failed."""
    passed, detail = 0, ""
    for number, (given, wanted) in enumerate(cases, 1):
        done = _run(lambda: _stdio_harness(code), given.encode("utf-8", "surrogatepass"), limits)
        reported = done.result if done.result is not None else ""
        if done.killed or done.status != 0 or reported:
            why = reported or done.failure()
        elif same_output(done.output.decode("utf-8", "replace"), wanted):
            passed += 1
            continue
        else:
            why = "wrong output"
        detail = detail or f"case {number}: {why}"
        if stop_early or done.killed:
            break
    return {"passed": passed, "total": len(cases), "detail": detail}


def same_output(got: str, want: str) -> bool:
    """Token by token, line by line; spaces within a line and blank lines at the end do not matter."""
    return [line.split() for line in got.rstrip().splitlines()] == [
        line.split() for line in want.rstrip().splitlines()
    ]


def _run(harness: Callable[[], None], stdin: bytes, limits: Limits) -> _Finished:
    """Fork, become the program, run `harness`; meanwhile read what comes and hold the clock."""
    nonce = os.urandom(16).hex()
    folder = tempfile.mkdtemp(prefix="program-")
    secret_in, secret_out = os.pipe()
    result_in, result_out = os.pipe()
    output_in, output_out = os.pipe()
    try:
        os.write(secret_out, nonce.encode())
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            pid = os.fork()
            if pid == 0:
                _become(harness, given.fileno(), output_out, secret_in, result_out, folder, limits)
        for fd in (result_out, output_out, secret_in, secret_out):
            os.close(fd)
        try:
            received, killed = _collect(result_in, output_in, limits)
        finally:
            status = _end(pid)
        head, _, result = received[result_in].decode("utf-8", "replace").partition(" ")
        return _Finished(result if head == nonce else None, received[output_in], status, killed)
    finally:
        for fd in (result_in, output_in):
            os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)


def _collect(result_in: int, output_in: int, limits: Limits) -> tuple[dict[int, bytes], str]:
    """Read both pipes until the program has closed them, time is up, or it has said too much."""
    deadline = time.monotonic() + limits.timeout_s
    parts: dict[int, list[bytes]] = {result_in: [], output_in: []}
    size, killed = 0, ""
    poll = select.poll()
    poll.register(result_in, select.POLLIN)
    poll.register(output_in, select.POLLIN)
    if _parent >= 0:
        poll.register(_parent, 0)  # no events asked for: only a hang-up is reported
    still_open = 2
    while still_open and not killed:
        left = deadline - time.monotonic()
        ready = poll.poll(1000 * left) if left > 0 else []
        if not ready:
            killed = f"time ran out after {limits.timeout_s:g} s"
        for fd, _ in ready:
            if fd == _parent:
                killed = "the parent process is gone"
                continue
            part = os.read(fd, 1 << 16)
            if not part:
                poll.unregister(fd)
                still_open -= 1
            parts[fd].append(part)
            size += len(part)
        if size > limits.output_bytes:
            killed = f"printed more than {limits.output_bytes} bytes"
    return {fd: b"".join(read) for fd, read in parts.items()}, killed


def _end(pid: int) -> int:
    """Kill the program's process group and every other descendant; its exit status."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    while orphans := _children():
        for orphan in orphans:
            with suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)
    return status


def _children() -> list[int]:
    """Process ids of this process's children (Linux; elsewhere none are found)."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def _become(
    harness: Callable[[], None],
    stdin: int,
    output: int,
    secret: int,
    result: int,
    folder: str,
    limits: Limits,
) -> NoReturn:
    """In the fork: give up everything the worker has, then run the harness. Never returns."""
    leave = os._exit
    try:
        os.setsid()
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Above the fixed numbers first, so that no dup2 overwrites a descriptor still to be moved.
        high = [os.dup(fd) if fd > 15 else _dup_above(fd, 16) for fd in (stdin, output, secret, result)]
        for source, target in zip(high, (0, 1, SECRET_FD, RESULT_FD), strict=True):
            os.dup2(source, target)
        os.dup2(1, 2)
        os.closerange(RESULT_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(PATH=os.defpath, HOME=folder, TMPDIR=folder, LANG="C.UTF-8")
        tempfile.tempdir = folder
        sys.argv, sys.path = ["program.py"], [p for p in sys.path if "packages" in p or "lib" in p]
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if random := sys.modules.get("random"):
            random.seed(0)
        _limit(limits)
        _forbid_outside(folder)
        harness()
    finally:
        leave(70)


def _dup_above(fd: int, lowest: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD, lowest)


def _limit(limits: Limits) -> None:
    cpu = int(limits.timeout_s) + 1
    for what, soft in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        bound = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(what, (bound, bound))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))


def _forbid_outside(folder: str) -> None:
    """Refuse, for good, what a solution never needs: processes, the network, ctypes, files elsewhere."""
    refused = (  # noqa: SIM905
        "os.fork os.forkpty os.exec os.posix_spawn os.spawn os.system subprocess.Popen pty.spawn os.kill "
        "os.killpg signal.pthread_kill os.setxattr os.removexattr"
    ).split()
    families = ("socket.", "ctypes.")
    writes = (  # noqa: SIM905
        "os.remove os.rename os.rmdir os.mkdir os.chmod os.chown os.link os.symlink os.truncate os.utime "
        "os.chflags os.mkfifo os.mknod shutil.rmtree shutil.move shutil.copyfile shutil.copytree"
    ).split()
    denied, guarded = frozenset(refused), frozenset(writes)
    home = os.path.realpath(folder)
    inside = home + os.sep
    realpath, fspath, fsdecode = os.path.realpath, os.fspath, os.fsdecode
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor that is already open, or a flag
        real = realpath(fsdecode(fspath(path)))
        return real == home or real.startswith(inside) or real == os.devnull

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            allowed = not (args[2] or 0) & writing or within(args[0])
        elif event in guarded:
            # A name relative to an open folder's descriptor (the last argument) could lie anywhere.
            relative = (
                event.startswith("os.") and isinstance(args[-1], int) and args[-1] >= 0 and len(args) > 1
            )
            mode_like = event in ("os.chmod", "os.mkdir", "os.chown", "os.truncate", "os.utime")
            allowed = all(within(arg) for arg in args[:2]) and (mode_like or not relative)
        else:
            allowed = event not in denied and not event.startswith(families)
        if not allowed:
            raise PermissionError(f"{event} is not allowed in a program under test")

    sys.addaudithook(hook)


def _module(name: str) -> dict[str, Any]:
    """The namespace of a fresh module that is registered as dataclasses and pickle expect."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def _report(nonce: bytes, text: str, write: Callable[[int, bytes], int] = os.write) -> None:
    write(RESULT_FD, nonce + b" " + text[:1000].encode("utf-8", "replace"))


def _words(error: BaseException) -> str:
    """An exception in one line; its own `__str__` may raise."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    except BaseException:
        return "an exception that cannot be printed"


def _assert_harness(code: str, tests: list[str], stop_early: bool) -> None:
    # Everything used after the program has run is bound before: the program may patch builtins and modules.
    # The program is not `__main__` here, so its own demonstration under that guard stays out.
    run, build, read, report, leave, words = exec, compile, os.read, _report, os._exit, _words
    base, text_of, order = BaseException, str, enumerate
    compiled = [build(test, f"test {number}", "exec") for number, test in order(tests, 1)]
    total = len(tests)
    passed, detail = 0, ""
    namespace = _module("solution")
    try:
        run(build(code, "program", "exec"), namespace)
    except base as error:
        detail, compiled = "the program raised " + words(error), []
    for number, test in order(compiled, 1):
        try:
            run(test, namespace)
            passed += 1
        except base as error:
            if not detail:
                detail = "test " + text_of(number) + " of " + text_of(total) + ": " + words(error)
            if stop_early:
                break
    report(read(SECRET_FD, 64), text_of(passed) + " " + detail)
    leave(0)


def _stdio_harness(code: str) -> None:
    report, read, leave, words = _report, os.read, os._exit, _words
    out = sys.stdout
    status: Any = 0
    try:
        exec(compile(code, "program", "exec"), _module("__main__"))
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException as error:
        report(read(SECRET_FD, 64), "the program raised " + words(error))
        leave(1)
    with suppress(BaseException):
        sys.stdout.flush()
    with suppress(BaseException):
        out.flush()
    report(read(SECRET_FD, 64), "" if status == 0 else "exited with status " + str(status)[:100])
    leave(0)
