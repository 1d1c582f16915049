"""The child process of `rewards.pool`: `python -m rewards.worker SCRATCH [unsafe]`.

Answers requests one at a time over the socket at descriptor 0, until the other end closes. A program under
test runs in a fork (`programs.run`), so that it cannot harm the next task. Whatever else fails here is this
process's fault and not the task's: it says so and ends, for the pool to replace it.
"""

import os
import resource
import sys
from contextlib import suppress
from typing import Any

from rewards.programs import isolate, run
from rewards.wire import Channel, words

MEMORY_BYTES = 2 << 30
"""Address space; programs under test have their own, smaller limit."""


def answer(task: dict[str, Any], parent: int, scratch: str, unsafe: bool) -> dict[str, Any]:
    """The reply to one request; `op` names what is asked."""
    match task["op"]:
        case "load":
            run.warm(scratch, parent)
            return {"active": isolate.describe(), "gap": isolate.gap()}
        case "asserts" | "stdio" | "output":
            if not unsafe and (gap := isolate.gap()):
                return {"error": f"programs are not run: {gap}"}
            limits = run.Limits(**task["limits"])
            if task["op"] == "output":
                output, why, _ = run.run_once(task["code"], "", limits)
                return {"output": output, "why": why}
            tested = run.run_asserts if task["op"] == "asserts" else run.run_stdio
            return tested(task["code"], task["tests"], limits, task["stop_early"])
    raise ValueError(f"unknown op {task['op']!r}")


def main() -> int:
    """Serve until the parent closes the socket."""
    scratch, unsafe = sys.argv[1], "unsafe" in sys.argv[2:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    isolate.hide_memory()
    channel = Channel(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    with suppress(EOFError):  # the parent is gone
        while True:
            task = channel.receive()
            try:
                reply = answer(task, channel.fd, scratch, unsafe)
            except Exception as error:
                channel.send({"error": words(error), "kind": "died"})
                return 1
            channel.send(reply)
    return 0


if __name__ == "__main__":
    sys.exit(main())
