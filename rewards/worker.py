"""The child process of `rewards.pool`: `python -m rewards.worker MEMORY_BYTES`.

Answers requests one at a time until its input closes. Mathematics runs in a fork (`maths.solver`) and a
program under test in another (`programs.run`), so that neither can harm the next task.
"""

import gc
import os
import resource
import shutil
import sys
from contextlib import suppress
from typing import Any

from rewards import wire
from rewards.maths import engine
from rewards.maths.solver import Solver
from rewards.programs import run


def answer(task: dict[str, Any], solver: Solver) -> dict[str, Any]:
    """The reply to one request; `op` names what is asked."""
    match task["op"]:
        case "load":
            return _load(task["for"])
        case "math":
            return solver.compare(task["gold"], task["answer"], task["timeout_s"])
        case "asserts" | "stdio":
            limits = run.Limits(**task["limits"])
            tested = run.run_asserts if task["op"] == "asserts" else run.run_stdio
            return tested(task["code"], task["tests"], limits, task["stop_early"])
    raise ValueError(f"unknown op {task['op']!r}")


def _load(op: str) -> dict[str, Any]:
    active = "" if op == "math" else run.warm()
    if op == "math":
        engine.load()
    gc.collect()
    gc.freeze()  # forks then share these pages instead of copying them at their first collection
    return {"active": active}


def main() -> int:
    """Serve until the parent closes the input."""
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # whatever a library prints must not land among the replies
    os.dup2(nothing, 1)
    run.adopt_orphans(requests.fileno())
    solver = Solver(requests.fileno())
    while True:
        try:
            task = wire.receive(requests.read)
        except EOFError:  # the parent is gone, and may have left the folder
            shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
            return 0
        try:
            reply = answer(task, solver)
        except Exception as error:
            reply = wire.failure(error)
        with suppress(BrokenPipeError):  # the parent is gone: the next read ends the loop
            wire.write(replies, reply)


if __name__ == "__main__":
    sys.exit(main())
