"""Run an untrusted Python program against its tests, with a verdict that it cannot forge.

Runs inside `rewards.worker` only, as three processes: the worker, which has the tests and the clock; the
program, forked from `zygote`, whose memory never held a test; and for assert-style tests the judge
(`judge`), a fork of the worker that runs them against the program over a socket. Only the judge holds the
pipe of the verdict, and stdin/stdout cases are compared here. Forks of warm interpreters cost milliseconds.

The program gets what `isolate` and `hook` leave it, an empty working folder that is deleted
afterwards, an empty environment, and no open files but those named. At its end it is killed, and with it
every process it made.

Known limits: where namespaces are not available, a program can ask whether a file exists, and fill the disk
with some hundred megabytes before it is stopped. A test that calls a second function of the program trusts
that function. And a program may reproduce a public benchmark from memory.
"""

import gc
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from rewards.fork import Fork
from rewards.programs import hook, isolate
from rewards.programs.judging import controls, judge, remote
from rewards.programs.zygote import Limits, Zygote, seed, standard_streams
from rewards.wire import Channel

__all__ = ["Limits", "run_asserts", "run_stdio", "same_output", "warm"]

WARM_MODULES = (
    "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools",
    "hashlib", "heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing",  # noqa: E501
)  # fmt: skip
JUDGE_MEMORY_BYTES = 1 << 30
_DECIMAL = re.compile(r"^(-?\d+)\.(\d*?)0*$")

_parent = -1  # both set by `warm`
_zygote: Zygote | None = None


@dataclass(slots=True)
class _Run:
    pid: int = 0
    status: int = 0  # waitpid's
    killed: str = ""  # why it was killed, or ""
    output: dict[int, bytearray] = field(default_factory=dict)  # by descriptor

    def failure(self) -> str:
        if os.WIFSIGNALED(self.status):
            return f"killed by {signal.Signals(os.WTERMSIG(self.status)).name}"
        return f"exited with status {os.WEXITSTATUS(self.status)} before the tests had run to the end"


def warm(scratch: str, parent: int) -> None:
    """Import what programs commonly import, confine this process, fork the zygote.

    `scratch` is a folder to be made for a program at work where it needs one on disk; `parent` a descriptor
    that hangs up when the worker's own parent is gone: a running program is stopped then.
    """
    global _zygote, _parent
    if _zygote is None:
        for name in WARM_MODULES:
            import_module(name)
        _parent = parent
        standard_streams()
        isolate.enter()
        gc.collect()
        gc.freeze()  # as in `worker`
        _zygote = Zygote(scratch)
        isolate.obey(isolate.file_rules(None))
        hook.rule(None)


def run_asserts(code: str, tests: list[str], limits: Limits, stop_early: bool) -> dict[str, Any]:
    """Run the program in one process and the tests on it in another, under one clock.

    Returns `passed`, `total` and a `detail` about the first failure; or `error`: what the tests ask cannot be
    judged.
    """
    try:
        for number, test in enumerate(tests, 1):
            judge.compiled(test, number)  # once for all programs of a group
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"error": f"a test does not compile: {error}"}
    end = time.monotonic() + limits.timeout_s + 3  # for controls
    reply = _beside(code, lambda fd: judge.judge(fd, tests, stop_early), limits)
    if "doubtful" in reply:

        def replay(messages: list[Any]) -> Any:
            late = time.monotonic() > end
            return (
                None
                if late
                else _beside(code, lambda fd: controls.replay(fd, messages), limits).get("answer")
            )

        doubt = controls.doubted(reply["log"], reply["doubtful"], replay)
        if doubt:
            reply = {"passed": 0, "detail": doubt}
        elif doubt == "":
            reply = {"error": "the tests compare objects of the program in a way that cannot be checked"}
    if reply.get("unjudged"):
        reply = {"error": reply["unjudged"]}
    if "error" in reply:
        return {"error": reply["error"]}
    return {"passed": reply["passed"], "total": len(tests), "detail": reply["detail"]}


def _beside(code: str, work: Callable[[int], dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """Start a program, and `work` with the socket to it in a judge's process; what that returns."""
    assert _zygote is not None
    ours, theirs = socket.socketpair()
    nothing = os.open(os.devnull, os.O_RDWR)
    program = _Run()
    try:
        program.pid = _zygote.start(code, "asserts", limits, [nothing, nothing, nothing, theirs.fileno()])
        theirs.close()
        try:
            reply, why = _judged(ours, work, limits)
        finally:
            program.status = _zygote.end()
    finally:
        os.close(nothing)
        ours.close()
        theirs.close()
    if not reply:
        return {"passed": 0, "detail": why}
    if remote.ENDED in reply.get("detail", ""):
        reply["detail"] += f" ({program.failure()})"
    return reply


def _judged(
    link: socket.socket, work: Callable[[int], dict[str, Any]], limits: Limits
) -> tuple[dict[str, Any], str]:
    """What the judge found, or nothing and why. EOFError: it died, not by the program's doing."""
    fork = Fork(partial(_judge, link.fileno(), work, limits), [link.fileno()], _parent)
    link.close()
    try:
        return fork.channel.receive(time.monotonic() + limits.timeout_s), ""
    except TimeoutError:
        return {}, f"time ran out after {limits.timeout_s:g} s"
    finally:
        fork.end()


def _judge(link: int, work: Callable[[int], dict[str, Any]], limits: Limits, answers: Channel) -> None:
    isolate.die_with_parent()
    os.setsid()
    isolate.limit(int(limits.timeout_s) + 1, JUDGE_MEMORY_BYTES, limits.file_bytes, limits.processes)
    isolate.confine()  # the worker's file rules hold for its forks
    hook.forbid(None)
    sys.set_int_max_str_digits(0)
    seed()
    answers.send(work(link))


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
    assert _zygote is not None
    stdin = os.memfd_create("input")
    output_in, output_out = os.pipe()
    errors_in, errors_out = os.pipe()
    try:
        with open(os.dup(stdin), "wb") as file:
            file.write(given)
        os.lseek(stdin, 0, os.SEEK_SET)
        run = _Run(_zygote.start(code, "stdio", limits, [stdin, output_out, errors_out]))
        for fd in (output_out, errors_out):
            os.close(fd)
        try:
            _collect(run, [output_in, errors_in], limits)
        finally:
            run.status = _zygote.end()
    finally:
        for fd in (stdin, output_in, errors_in):
            os.close(fd)
    errors = run.output[errors_in].decode("utf-8", "replace").strip().splitlines()
    return run, run.output[output_in].decode("utf-8", "replace"), errors[-1][:300] if errors else ""


def same_output(got: str, want: str) -> bool:
    """Token by token, line by line; spaces within a line and blank lines at the end do not matter, nor does
    how many zeros end a decimal fraction."""
    lines = [
        [[_DECIMAL.sub(r"\1.\2", token) for token in line.split()] for line in text.rstrip().splitlines()]
        for text in (got, want)
    ]
    return lines[0] == lines[1]


def _collect(run: _Run, pipes: list[int], limits: Limits) -> None:
    """Read the pipes until the process ends, or exceeds its limits."""
    deadline = time.monotonic() + limits.timeout_s
    run.output = {fd: bytearray() for fd in pipes}
    process, poll = os.pidfd_open(run.pid), select.poll()
    for fd in pipes:
        os.set_blocking(fd, False)
    for fd in (*pipes, process):
        poll.register(fd, select.POLLIN)
    if _parent >= 0:
        poll.register(_parent, 0)  # no events asked for: only a hang-up is reported
    ended = False
    try:
        while not run.killed and not ended:
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
        for fd in pipes:  # what was left in the pipes when it ended
            while ended and not run.killed and _read_some(run, fd, limits):
                pass
    finally:
        os.close(process)


def _read_some(run: _Run, fd: int, limits: Limits) -> bool:
    """Read what is there; `False` at the end of the stream."""
    try:
        part = os.read(fd, 1 << 16)
    except BlockingIOError:
        return False
    run.output[fd] += part
    if sum(map(len, run.output.values())) > limits.output_bytes:
        run.killed = f"printed more than {limits.output_bytes} bytes"
    return bool(part)
