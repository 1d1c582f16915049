"""Whether reference answers can be verified at all: checked when problems are loaded, not when graded."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rewards.maths.grade import grade_math
from rewards.pool import WorkerPool, shared_pool

PROBE = "13.7531"  # a number that is no reference answer: what cannot be told from it cannot be verified
# What data sets put where an answer is missing, or where none can be checked by rules.
_NO_ANSWER = re.compile(
    r"None|NaN|nan|null|NULL|(?i:proof|prove(?:d| it)?|q\.?e\.?d\.?|(?:answer |solution )?not[ _]?(?:found|"
    r"provided|given|available|applicable)|n/?a|tbd|todo|unknown|error|see (?:the )?(?:solution|proof|above|"
    r"below)\b.*|(?:the )?(?:proof|answer|solution) (?:is )?(?:omitted|missing|required|above|below|needed)|"
    r"\[?(?:answer|solution|your answer(?: here)?)\]?)",
)
_STRUCTURE = re.compile(r"\{\s*(?:[\"'].*:.*)?\}|\[\s*(?:[\"'].*)?\]", re.DOTALL)  # a dict, or a list of text


def check_golds(answers: Sequence[str], *, pool: WorkerPool | None = None) -> list[str]:
    """Why each reference answer cannot be verified, or "" where it can; equal ones are looked at once.

    Microseconds each; those that take algebra are parsed in `pool`, or the process's shared one.
    """
    distinct = list(dict.fromkeys(answers))
    reasons = {answer: _no_answer(answer) for answer in distinct}
    left = [answer for answer in distinct if not reasons[answer]]
    workers = pool or shared_pool()
    with ThreadPoolExecutor(workers.size) as threads:
        found = threads.map(lambda gold: _unverifiable(gold, workers), left)
        for answer, reason in zip(left, found, strict=True):
            reasons[answer] = reason
    return [reasons[answer] for answer in answers]


def _no_answer(answer: str) -> str:
    text = answer.strip().strip("$").removesuffix(".").strip()
    if not text:
        return "it is empty"
    if _NO_ANSWER.fullmatch(text):
        return f"{text[:40]!r} is no answer"
    return "it is a structure, not an answer" if _STRUCTURE.fullmatch(text) else ""


def _unverifiable(gold: str, pool: WorkerPool) -> str:
    outcome = grade_math(gold, PROBE, pool=pool)
    return outcome.detail if outcome.value is None else ""
