"""The child process of `rewards.pool`: `python -m rewards.worker MEMORY_BYTES`.

Answers requests one at a time until its input closes. Mathematics runs in a fork (`maths.solver`) and a
program under test in another (`programs.run`), so that neither can harm the next task.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
from contextlib import suppress
from typing import Any, BinaryIO

from rewards import wire
from rewards.maths import engine
from rewards.maths.solver import Solver
from rewards.programs import run


def answer(task: dict[str, Any], solver: Solver) -> dict[str, Any]:
    """The reply to one request; `op` names the task."""
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
    if op == "math":
        engine.load()
        active = ""
    else:
        active = run.warm()
    gc.collect()
    gc.freeze()  # forks then share these pages instead of copying them at their first collection
    return {"pid": os.getpid(), "active": active}


def _read(source: BinaryIO, length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        raise EOFError
    return data


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
            task = json.loads(_read(requests, wire.length_of(_read(requests, wire.HEAD_BYTES))))
        except EOFError:  # the parent is gone, and may have left the folder
            shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
            return 0
        try:
            reply = answer(task, solver)
        except MemoryError:
            reply = {"error": "memory ran out", "kind": "memory"}
        except RecursionError:
            reply = {"error": "recursion too deep", "kind": "memory"}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500], "kind": "raised"}
        with suppress(BrokenPipeError):  # the parent is gone: the next read ends the loop
            wire.write(replies, reply)


if __name__ == "__main__":
    sys.exit(main())
