"""Run an untrusted Python program against its tests, with a verdict that it cannot forge.

Runs inside `rewards.worker` only, as three processes: the worker, which has the tests and the clock; the
program, forked from `zygote`, whose memory never held a test; and for assert-style tests the judge
(`judge`), a fork of the worker that runs them against the program over a socket. Only the judge holds the
pipe of the verdict, and stdin/stdout cases are compared here. Forks of warm interpreters cost milliseconds.

The program gets what `isolate` and `hook` leave it, an empty working folder that is deleted afterwards, an
empty environment, and no open files but those named. At its end every process it made is killed with it.

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
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any

from rewards.fork import Fork
from rewards.programs import hook, isolate
from rewards.programs.judging import controls, judge
from rewards.programs.zygote import Limits, Zygote, seed, standard_streams
from rewards.wire import Channel

__all__ = ["Limits", "run_asserts", "run_once", "run_stdio", "same_output", "warm"]

WARM_MODULES = (
    "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools",
    "hashlib", "heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing",  # noqa: E501
)  # fmt: skip
JUDGE_MEMORY_BYTES = 1 << 30
_DECIMAL = re.compile(r"^(-?\d+)\.(\d*?)0*$")

_parent = -1  # both set by `warm`
_zygote: Zygote | None = None


def warm(scratch: str, parent: int) -> None:
    """Import what programs commonly import, confine this process, fork the zygote.

    `scratch` is a folder to be made for a program at work where it needs one on disk; `parent` a descriptor
    that hangs up when the worker's own parent is gone: a running program is stopped then."""
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
        isolate.obey_file_rules(None)


def run_asserts(code: str, tests: list[str], limits: Limits, stop_early: bool) -> dict[str, Any]:
    """Run the program in one process and the tests on it in another, under one clock.

    Returns `passed`, `total` and a `detail` about the first failure; or `error`: what the tests ask cannot be
    judged."""
    try:
        for number, test in enumerate(tests, 1):
            judge.compiled(test, number)  # once for all programs of a group
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"error": f"a test does not compile: {error}"}
    end = time.monotonic() + limits.timeout_s + 3  # for controls
    reply = _beside(code, lambda fd: judge.judge(fd, tests, stop_early), limits)
    if "doubtful" in reply:

        def replay(messages: list[Any]) -> Any:
            if time.monotonic() > end:
                return None
            return _beside(code, lambda fd: controls.replay(fd, messages), limits).get("answer")

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
    """Start a program, and `work` with the socket to it in a judge's process; what that returns.

    EOFError: the judge died, not by the program's doing."""
    assert _zygote is not None
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull, "r+b", buffering=0) as nothing:
        _zygote.start(code, "asserts", limits, [*[nothing.fileno()] * 3, theirs.fileno()])
        try:
            theirs.close()
            fork = Fork(partial(_judge, work, limits), [ours.fileno()], _parent)
            try:
                ours.close()
                reply: dict[str, Any] = fork.channel.receive(time.monotonic() + limits.timeout_s)
            except TimeoutError:
                reply = {"passed": 0, "detail": _late(limits)}
            finally:
                fork.end()
        finally:
            status = _zygote.end()
    if "the program ended" in reply.get("detail", ""):
        reply["detail"] += f" ({_ending(status)})"
    return reply


def _judge(work: Callable[[int], dict[str, Any]], limits: Limits, answers: Channel, link: int) -> None:
    isolate.die_with_parent()
    os.setsid()
    isolate.limit(int(limits.timeout_s) + 1, JUDGE_MEMORY_BYTES, limits.file_bytes, limits.processes)
    isolate.confine()  # the worker's file rules hold for its forks
    hook.forbid(None)
    sys.set_int_max_str_digits(0)
    seed()
    answers.send(work(link))


def _late(limits: Limits) -> str:
    return f"time ran out after {limits.timeout_s:g} s"


def _ending(status: int) -> str:
    """What a status of waitpid's says."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with status {os.WEXITSTATUS(status)} before the tests had run to the end"


def run_stdio(code: str, cases: list[list[str]], limits: Limits, stop_early: bool) -> dict[str, Any]:
    """Run the program once per `[input, output]` case. After a time-out the rest count as failed."""
    passed, detail = 0, ""
    for number, (given, wanted) in enumerate(cases, 1):
        output, why, stopped = run_once(code, given, limits)
        if not why and same_output(output, wanted):
            passed += 1
            continue
        detail = detail or f"case {number}: {why or 'wrong output'}"
        if stop_early or stopped:
            break
    return {"passed": passed, "total": len(cases), "detail": detail}


def run_once(code: str, given: str, limits: Limits) -> tuple[str, str, bool]:
    """What the program printed, why it failed, or "", and whether it exceeded its limits."""
    assert _zygote is not None
    with ExitStack() as stack:
        files = [stack.enter_context(open(os.memfd_create(name), "w+b")) for name in ("in", "out", "err")]
        files[0].write(given.encode("utf-8", "surrogatepass"))
        files[0].seek(0)
        pid = _zygote.start(code, "stdio", limits, [file.fileno() for file in files])
        try:
            stopped = _wait(pid, limits)
        finally:
            status = _zygote.end()
        if not stopped and sum(os.fstat(file.fileno()).st_size for file in files[1:]) > limits.output_bytes:
            stopped = f"printed more than {limits.output_bytes} bytes"
        output, errors = (
            os.pread(file.fileno(), limits.output_bytes, 0).decode("utf-8", "replace") for file in files[1:]
        )
    why = errors.strip().splitlines()[-1:] or [_ending(status)] if status else [""]
    return output, stopped or why[0][:300], bool(stopped)


def _wait(pid: int, limits: Limits) -> str:
    """Wait for the end of a program; why it has to be stopped, or ""."""
    process, poll = os.pidfd_open(pid), select.poll()
    try:
        poll.register(process, select.POLLIN)
        if _parent >= 0:
            poll.register(_parent, 0)  # no events asked for: only a hang-up is reported
        ready = [fd for fd, _ in poll.poll(1000 * limits.timeout_s)]
    finally:
        os.close(process)
    return "" if process in ready else "the parent process is gone" if ready else _late(limits)


def same_output(got: str, want: str) -> bool:
    """Token by token, line by line; spaces within a line and blank lines at the end do not matter, nor does
    how many zeros end a decimal fraction."""
    lines = [
        [[_DECIMAL.sub(r"\1.\2", token) for token in line.split()] for line in text.rstrip().splitlines()]
        for text in (got, want)
    ]
    return lines[0] == lines[1]
