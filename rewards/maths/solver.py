"""Mathematics in a fork of the worker that is killed when it takes too long, and replaced in milliseconds.

Importing sympy takes half a second and more on a busy machine; a fork of a process that has it takes a few
milliseconds. So the worker holds the clock of each comparison itself, and one that hangs costs its own limit
and no more.
"""

import gc
import math
import os
import resource
import select
import signal
import time
from contextlib import suppress
from typing import Any, NoReturn

from rewards import wire
from rewards.maths.engine import equivalent
from rewards.programs import isolate


class Solver:
    """The fork that compares, and the worker's two pipes to it."""

    def __init__(self, parent: int = -1) -> None:
        self._parent = parent  # a descriptor that hangs up when the worker's own parent is gone
        self._pid = 0

    def compare(self, gold: str, answer: str, timeout_s: float) -> dict[str, Any]:
        """`value` and `detail` of `equivalent`, or `error` with `kind`, `stage` and `cpu_s`."""
        if not self._pid:
            self._start()
        stage, stage_cpu_s = "", 0.0
        deadline = time.monotonic() + timeout_s
        try:
            wire.write(self._requests, {"gold": gold, "answer": answer, "cpu_s": timeout_s + 1})
            while True:
                reply = wire.receive(lambda length: self._read(length, deadline))
                if "stage" not in reply:
                    break
                stage, stage_cpu_s = reply["stage"], reply["cpu_s"]
        except TimeoutError:
            spent = max(0.0, self._stop() - stage_cpu_s)
            why = f"time ran out: no reply within {timeout_s:g} s"
            return {"error": why, "kind": "time", "stage": stage, "cpu_s": spent}
        except (EOFError, BrokenPipeError):
            self._stop()
            return {"error": "the comparing process died", "kind": "died", "stage": stage, "cpu_s": 0.0}
        if "error" in reply:  # its memory may be in any state
            self._stop()
            reply |= {"stage": stage, "cpu_s": 0.0}
        return reply

    def _start(self) -> None:
        their_in, self._requests = os.pipe()
        self._replies, their_out = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._replies)
            _serve(their_in, their_out)
        os.close(their_in)
        os.close(their_out)

    def _stop(self) -> float:
        """Kill the fork; the CPU seconds that it used."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        _, _, usage = os.wait4(self._pid, 0)
        os.close(self._requests)
        os.close(self._replies)
        self._pid = 0
        return usage.ru_utime + usage.ru_stime

    def _read(self, length: int, deadline: float) -> bytes:
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        if self._parent >= 0:
            poll.register(self._parent, 0)  # no events asked for: only a hang-up is reported
        left = deadline - time.monotonic()
        ready = poll.poll(1000 * left) if left > 0 else []
        if not ready or any(fd == self._parent for fd, _ in ready):
            raise TimeoutError
        return os.read(self._replies, length)


def _serve(requests: int, replies: int) -> NoReturn:
    try:
        isolate.die_with_parent()
        gc.freeze()
        with open(requests, "rb") as source:
            while True:
                task = wire.receive(source.read)  # raises when the worker is gone
                # The kernel ends this process then, even if the worker is gone.
                limit = math.ceil(time.process_time() + task["cpu_s"]) + 1
                resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
                wire.write(replies, _answer(task, replies))
    finally:
        os._exit(0)


def _answer(task: dict[str, Any], replies: int) -> dict[str, Any]:
    def stage(name: str) -> None:
        wire.write(replies, {"stage": name, "cpu_s": time.process_time()})

    try:
        value, detail = equivalent(task["gold"], task["answer"], stage)
        return {"value": value, "detail": detail}
    except Exception as error:
        return wire.failure(error)
