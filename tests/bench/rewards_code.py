"""Grading programs: HumanEval's reference solutions (read from R1_DATA), each with its tests, on two workers.

No claim against a rival here but a floor: 60 programs a second. The profile says where a program's time goes.
"""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewards.pool import WorkerPool
from rewards.programs.grade import active_sandbox, run_tests
from tests.bench.measure import interleave
from tests.data import checked_programs

SUMMARY = "HumanEval programs a second on two workers, each in a sandbox of its own: at least 60"
AT_LEAST, ROUNDS = 60.0, 5


def run() -> dict[str, Any]:
    """Time complete passes over the 164 programs; nothing is remembered from one to the next."""
    programs = checked_programs("humaneval")
    passes = 0
    with WorkerPool(2) as pool, ThreadPoolExecutor(2) as threads:

        def once() -> None:
            nonlocal passes
            passes += 1
            salt = f"\n# pass {passes}\n"  # a program of its own, so that no verdict is remembered
            done = threads.map(
                lambda job: run_tests(job[0] + salt, job[1], pool=pool, timeout_s=10), programs
            )
            assert all(outcome.value == 1 for outcome in done)

        timing = interleave({"humaneval": once}, rounds=ROUNDS)["humaneval"]
        sandbox = active_sandbox(pool)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "claims": [
            {
                "claim": "programs a second",
                "value": len(programs) / timing.median,
                "at_least": AT_LEAST,
                "unit": "/s",
            }
        ],
        "programs": len(programs),
        "sandbox": sandbox,
        "pass": timing.report(),
        "cpu_s_a_program": (used.ru_utime + used.ru_stime) / (len(programs) * passes),
        "user_s_a_program": used.ru_utime / (len(programs) * passes),
        "system_s_a_program": used.ru_stime / (len(programs) * passes),
        "worker_spawn_s": _spawn(),
    }


def _spawn() -> float:
    """Seconds to start one worker, which happens once: why programs are forked and not started."""
    begin = time.perf_counter()
    with WorkerPool(1) as pool:
        run_tests("x = 1", ["assert x == 1, 2"], pool=pool)
    return time.perf_counter() - begin
