r"""Whether two mathematical answers are the same.

Three layers. `notation` and `numbers` settle numbers and equal notation in microseconds,
exactly; `compare` takes structure apart by stated rules; what is left, single expressions that need
algebra, goes to math-verify in a killable child (`engine`).

Three outcomes: 1, 0, or `None` where the verifier failed. An answer that is too expensive to check counts as
wrong, not as a verifier failure: time or memory ran out *after* the gold was parsed, and the child worked on
the answer for a good part of its limit (CPU time, so that a busy machine does not count against an answer).
Everything else (the gold does not parse or is too expensive itself, the child died, the machine was too busy)
is a verifier failure.
"""

from rewards.maths.compare import Undecided, compare, quick_leaf
from rewards.maths.notation import compact, normalise
from rewards.pool import DEFAULT_LIMIT_S, Memo, TaskFailed, WorkerPool, shared_pool
from rewards.registry import Outcome

__all__ = ["grade_math", "normalise", "quick_grade"]

LONGEST_ANSWER = 2000  # characters; longer ones are not answers, and would only cost parsing time
LONGEST_GOLD = 10_000
EXPENSIVE = 0.2  # share of the limit in CPU time on the answer: 1 s of 5, where comparisons take milliseconds

_results: Memo[Outcome] = Memo(size=16384, keep=lambda outcome: outcome.value is not None)


def grade_math(
    gold: str, answer: str, *, pool: WorkerPool | None = None, timeout_s: float = DEFAULT_LIMIT_S
) -> Outcome:
    """1 where `answer` equals `gold`, both text or LaTeX, 0 where it does not, `None`: the verifier failed.

    math-verify runs in `pool`, or the process's shared one, for at most `timeout_s` seconds of wall clock.
    """
    if (outcome := quick_grade(gold, answer)) is not None:
        return outcome
    return _results.get((gold, answer), lambda: _slow_grade(gold, answer, pool or shared_pool(), timeout_s))


def quick_grade(gold: str, answer: str) -> Outcome | None:
    """The verdict where it is certain without algebra, else `None`."""
    if not gold.strip():
        return Outcome(None, "the gold answer is empty", answer)
    if len(answer) > LONGEST_ANSWER:
        return Outcome(0.0, f"answer longer than {LONGEST_ANSWER} characters", answer)
    if len(gold) > LONGEST_GOLD:
        return Outcome(None, f"the gold answer is longer than {LONGEST_GOLD} characters", answer)
    want, got = normalise(gold), normalise(answer)
    if want == got:
        return Outcome(1.0, "equal as written", answer)
    if not got:
        return Outcome(0.0, "empty answer", answer)
    if compact(want) == compact(got):
        return Outcome(1.0, "equal as written", answer)
    try:
        value, detail = compare(want, got, quick_leaf)
    except Undecided:
        return None
    return Outcome(value, detail, answer)


def _slow_grade(gold: str, answer: str, pool: WorkerPool, timeout_s: float) -> Outcome:
    task = {"op": "math", "gold": normalise(gold), "answer": normalise(answer), "timeout_s": timeout_s}
    try:
        # The worker holds the comparison's clock; ours is a second, later one, for the worker itself.
        reply = pool.call(task, timeout_s + 5)
    except TaskFailed as failure:
        worked = failure.kind == "time" and failure.cpu_s >= EXPENSIVE * timeout_s
        if failure.stage == "answer" and (failure.kind == "memory" or worked):
            return Outcome(0.0, f"the answer is too expensive to compare: {failure}", answer)
        return Outcome(None, str(failure), answer)
    return Outcome(reply["value"], reply["detail"], answer)
