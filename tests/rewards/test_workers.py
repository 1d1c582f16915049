"""The pool: time-outs, deaths, threads, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from rewards.pool import TaskFailed, WorkerPool

ROOT = Path(__file__).resolve().parents[2]


def task(body: str = "pass", timeout_s: float = 5.0) -> dict:
    return {
        "op": "asserts",
        "code": f"asked = 0\n{body}",
        "tests": ["assert asked == 0"],
        "limits": {"timeout_s": timeout_s},
        "stop_early": True,
    }


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_starts_lazily_and_closes_for_good():
    pool = WorkerPool(2)
    assert pool.pids() == []
    assert pool.call(task())["passed"] == 1
    (pid,) = pool.pids()
    pool.close()
    pool.close()
    assert gone(pid)
    with pytest.raises(RuntimeError, match="closed"):
        pool.call(task())


def test_a_worker_that_died_idle_is_replaced():
    with WorkerPool(1) as pool:
        pool.call(task())
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert pool.call(task())["passed"] == 1
        assert pool.pids() != [pid]


def test_a_worker_that_hangs_fails_one_task():
    with WorkerPool(1) as pool:
        pool.call(task())
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TaskFailed, match=r"no reply within 0\.3 s"):
            pool.call(task(), timeout_s=0.3)
        assert gone(pid)
        assert pool.call(task())["passed"] == 1


def test_a_task_that_loses_two_workers_fails():
    with WorkerPool(1) as pool:
        pool.call(task())
        over = threading.Event()

        def kill_workers():
            while not over.wait(0.3):
                for pid in pool.pids():
                    os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_workers)
        killer.start()
        try:
            with pytest.raises(TaskFailed, match=r"died \(signal SIGKILL") as failed:
                pool.call(task("while True: pass", timeout_s=30), timeout_s=40)
        finally:
            over.set()
            killer.join()
        assert failed.value.kind == "died"
        assert pool.call(task())["passed"] == 1


@pytest.mark.parametrize("victim", ["worker", "zygote", "judge"])
def test_a_process_killed_in_the_middle_of_a_batch_costs_no_verdict(victim):
    """Each program is graded as if nothing had happened; the child is replaced."""
    pause = "import time\ntime.sleep(0.05)\n"
    with WorkerPool(1) as pool, ThreadPoolExecutor(1) as threads:
        pool.call(task())
        jobs = [task(f"{pause}x = {i}\nassert x % 2 == 0") for i in range(12)]
        replies, killed, again = [], 0, 0
        batch = threads.submit(lambda: [replies.append(pool.call(job)) for job in jobs])
        while not batch.done():
            time.sleep(0.02)  # two deaths of one task would be its own doing
            if killed < 3 and len(replies) >= again and (process := find(pool, victim)):
                os.kill(process, signal.SIGKILL)
                killed, again = killed + 1, len(replies) + 2
        batch.result()
        assert killed
        assert [reply["passed"] for reply in replies] == [1, 0] * 6


def find(pool: WorkerPool, victim: str) -> int | None:
    """One of the worker's processes: the zygote is its first fork, the judge its second."""
    for worker in pool.pids():
        if victim == "worker":
            return worker
        with suppress(FileNotFoundError):
            forks = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
            at = {"zygote": 0, "judge": 1}[victim]
            return int(forks[at]) if at < len(forks) else None
    return None


def test_an_error_in_a_task_leaves_the_worker_alive():
    with WorkerPool(1) as pool:
        pool.call(task())
        pids = pool.pids()
        with pytest.raises(TaskFailed, match="does not compile"):
            pool.call(task() | {"tests": ["assert ("]})
        assert pool.pids() == pids


def test_many_threads_share_few_workers():
    with WorkerPool(2) as pool, ThreadPoolExecutor(8) as threads:
        bodies = [f"x = {i}\nassert x % 2 == 0" for i in range(40)]
        replies = list(threads.map(lambda body: pool.call(task(body))["passed"], bodies))
        assert replies == [1, 0] * 20
        assert len(pool.pids()) <= 2


@pytest.mark.parametrize("without", [[], ["namespaces"]], ids=str)
@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)", "os.kill(worker, 9)"])
def test_nothing_is_left_when_the_parent_ends(end, without, tmp_path):
    """Even a parent that is killed in the middle of a task, and the program under test too."""
    script = (
        "import os, sys, threading, time\n"
        "from pathlib import Path\nfrom tests.rewards.outside import take_away\n"
        f"take_away({without}, Path())\n"
        "from rewards.pool import shared_pool\n"
        "task = {'op': 'asserts', 'code': 'open(\"x\", \"w\")\\nwhile True: pass', 'tests': ['f()'],"
        " 'limits': {'timeout_s': 30}, 'stop_early': True}\n"
        "threading.Thread(target=lambda: shared_pool().call(task, 40), daemon=True).start()\n"
        "time.sleep(0.7)\n"
        "worker = shared_pool().pids()[0]\n"
        "print(worker, open(f'/proc/{worker}/task/{worker}/children').read(), flush=True)\n" + end
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, check=False, stdout=subprocess.PIPE, timeout=20
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3  # the worker, the program and its judge
    assert all(gone(pid) for pid in pids)
    for _ in range(100):
        if not (left := os.listdir(tmp_path)):
            break
        time.sleep(0.02)
    assert left == []
