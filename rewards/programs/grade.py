"""Grade a program by its tests, in a sandboxed child process; `rewards.programs.run` says what it defends."""

import hashlib
import re
import textwrap
import threading
from collections.abc import Sequence

from rewards.maths.extract import answer_block, outside_think
from rewards.pool import START_LIMIT_S, TaskFailed, WorkerPool, shared_pool
from rewards.programs.tables import tabulated
from rewards.registry import Outcome
from rollout.types import StdioTest

DEFAULT_TIMEOUT_S = 5.0
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_CODE_LIKE = re.compile(r"\b(?:def|class|import|print|lambda|return|for|while)\b|[=(]")

# Groups repeat programs (a policy near its optimum writes the same one 16 times). Failures of the
# verifier are not remembered: they may be the machine's.
_results: dict[bytes, Outcome] = {}  # the last used is last
_results_lock = threading.Lock()
MOST_RESULTS = 4096


def extract_code(completion: str) -> str | None:
    """The program in a completion: the `<answer>`, or else the text outside `<think>`; of that the last
    ```` ```python ```` fence, or else its last fence, or else all of it. `None` where nothing is left."""
    visible = outside_think(completion, "lenient")
    text = answer_block(visible) or visible
    fences = _FENCE.findall(text)
    if not fences and not _CODE_LIKE.search(text):  # "<answer>see above</answer>": the fence is outside it
        fences = _FENCE.findall(visible)
    python = [body for tag, body in fences if tag.lower() in ("python", "python3", "py")]
    code = python[-1] if python else fences[-1][1] if fences else text
    code = textwrap.dedent(code) if code[:1].isspace() else code
    return code.strip("\n") if code.strip() else None


def run_tests(
    code: str,
    tests: Sequence[str | StdioTest],
    timeout_s: float = DEFAULT_TIMEOUT_S,
    *,
    partial_credit: bool = False,
    shown: int | None = None,
    pool: WorkerPool | None = None,
) -> Outcome:
    """Whether `code` passes `tests`: 1 or 0, or with `partial_credit` the share that it passes.

    Args:
        tests: Python statements that raise on failure, which see the program's names; what they define as
            pytest or unittest expect is run. Or stdin/stdout cases.
        timeout_s: Wall clock, seconds, of one run of the program: for all statements together, for each case.
        partial_credit: Run on after a failure; a run that times out still gets nothing.
        shown: How many of `tests`, from the first on, the question shows; `None` = all. A program that only
            tabulates them is wrong.

    Returns:
        `value=None` where the verifier failed: no tests, tests of both kinds, one that does not compile,
        tests that ask the program nothing or cannot be judged, or a worker that died. A program that crashes
        or never ends is simply wrong.
    """
    if tabulated(code, [test for test in tests[:shown] if isinstance(test, str)]):
        return Outcome(0.0, "a table of the cases that the question shows", code)
    job = hashlib.sha256(repr((timeout_s, partial_credit, list(tests), code)).encode()).digest()
    with _results_lock:
        outcome = _results.pop(job, None)
    outcome = outcome or _run(code, tests, timeout_s, partial_credit, pool or shared_pool())
    if outcome.value is not None:
        with _results_lock:
            _results[job] = outcome
            if len(_results) > MOST_RESULTS:
                del _results[next(iter(_results))]
    return outcome


def active_sandbox(pool: WorkerPool | None = None) -> str:
    """What confines a program on this machine, in words; see `rewards.programs.isolate.describe`."""
    return str((pool or shared_pool()).call({"op": "load"}, START_LIMIT_S)["active"])


def sandbox_gap(pool: WorkerPool | None = None) -> str:
    """Why programs cannot be confined on this machine, or ""; see `rewards.programs.isolate.gap`."""
    return str((pool or shared_pool()).call({"op": "load"}, START_LIMIT_S)["gap"])


def _run(
    code: str, tests: Sequence[str | StdioTest], timeout_s: float, partial: bool, pool: WorkerPool
) -> Outcome:
    statements = [test for test in tests if isinstance(test, str)]
    cases = [[test.input, test.output] for test in tests if isinstance(test, StdioTest)]
    if bool(statements) == bool(cases):
        return Outcome(None, "tests of both kinds" if cases else "no tests", code)
    task = {
        "op": "asserts" if statements else "stdio",
        "code": code,
        "tests": statements or cases,
        "limits": {"timeout_s": timeout_s},
        "stop_early": not partial,
    }
    try:
        # The worker holds the program's clock; ours is a second, later one, for the worker itself.
        reply = pool.call(task, timeout_s * (1 if statements else len(cases)) + 10)
    except TaskFailed as failure:
        return Outcome(None, str(failure), code)
    passed, total = reply["passed"], reply["total"]
    value = passed / total if partial else float(passed == total)
    return Outcome(value, reply["detail"] or f"passed {passed} of {total}", code)
