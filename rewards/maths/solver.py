"""Mathematics in a fork of the worker that is killed when it takes too long, and replaced in milliseconds.

The worker holds the clock of each comparison itself, so that one that hangs costs its own limit and no more.
"""

import gc
import math
import resource
import time
from typing import Any

from rewards import wire
from rewards.fork import Fork
from rewards.maths.engine import equivalent
from rewards.programs import isolate


class Solver:
    """The fork that compares. `parent` is a descriptor that hangs up when the worker's own parent is gone."""

    def __init__(self, parent: int = -1) -> None:
        self.parent = parent
        self._fork: Fork | None = None

    def compare(self, gold: str, answer: str, timeout_s: float) -> dict[str, Any]:
        """`value` and `detail` of `equivalent`, or `error` with `kind`, `stage` and `cpu_s`."""
        self._fork = self._fork or Fork(_serve, parent=self.parent)
        channel, deadline = self._fork.channel, time.monotonic() + timeout_s
        stage, stage_cpu_s = "", 0.0
        try:
            channel.send({"gold": gold, "answer": answer, "cpu_s": timeout_s + 1}, deadline)
            while "stage" in (reply := channel.receive(deadline)):
                stage, stage_cpu_s = reply["stage"], reply["cpu_s"]
        except TimeoutError:
            spent = max(0.0, self.stop() - stage_cpu_s)
            why = f"time ran out: no reply within {timeout_s:g} s"
            return {"error": why, "kind": "time", "stage": stage, "cpu_s": spent}
        except EOFError:
            self.stop()
            return {"error": "the comparing process died", "kind": "died", "stage": stage, "cpu_s": 0.0}
        if "error" in reply:  # its memory may be in any state
            self.stop()
            reply |= {"stage": stage, "cpu_s": 0.0}
        return reply

    def stop(self) -> float:
        """Kill the fork; the CPU seconds that it used."""
        fork, self._fork = self._fork, None
        return fork.end() if fork else 0.0


def _serve(channel: wire.Channel) -> None:
    isolate.die_with_parent()
    isolate.confine(isolate.file_rules(None))
    gc.freeze()
    while True:
        task = channel.receive()  # raises when the worker is gone
        # The kernel ends this process then, even if the worker is gone.
        limit = math.ceil(time.process_time() + task["cpu_s"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        channel.send(_answer(task, channel))


def _answer(task: dict[str, Any], channel: wire.Channel) -> dict[str, Any]:
    def stage(name: str) -> None:
        channel.send({"stage": name, "cpu_s": time.process_time()})

    try:
        value, detail = equivalent(task["gold"], task["answer"], stage)
        return {"value": value, "detail": detail}
    except Exception as error:
        return wire.failure(error)
