"""Verdicts of the rewards where the right one is known: nothing is timed here, all is counted.

Our own labelled pairs; golds of ten benchmarks (read from R1_DATA) against themselves, against the published
solutions that end in them and against another row's gold; HumanEval's and MBPP's programs, right and broken;
and hundreds of attacks on the sandbox in a row.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewards.maths.grade import grade_math
from rewards.maths.spans import boxes
from rewards.pool import WorkerPool
from rewards.programs.grade import active_sandbox, run_tests
from tests import data
from tests.bench._rewards import outcomes
from tests.rewards import answers, completions
from tests.rewards.attacks import FORGERIES, HARMFUL, TESTS, folders, left_behind

SUMMARY = "verdicts where the right one is known: golds, solutions, reference programs, attacks"
WITH_SOLUTIONS = ("math500", "math_test", "math_train", "gsm8k_test", "gsm8k_train")
GOLDS = (*WITH_SOLUTIONS, "aime24", "aime25", "amc23", "olympiadbench", "minerva_math")
ROUNDS = 22
"""Over all attacks; a thousand in a row."""
EXAMPLES = 10


Named = dict[str, list[tuple[bool, Any]]]
"""By name of a data set: whether each item is as it should be, and what it is."""


class Tally:
    """Claims about shares, with the counts behind them and examples of what missed."""

    def __init__(self) -> None:
        self.claims: list[dict[str, Any]] = []
        self.counts: dict[str, dict[str, str]] = {}
        self.missed: dict[str, list[Any]] = {}

    def count(self, claim: str, by_name: Named, at_least: float = 1.0) -> None:
        """Add a claim about the share of items that are as they should be."""
        self.counts[claim] = {n: f"{sum(ok for ok, _ in rows)}/{len(rows)}" for n, rows in by_name.items()}
        every = [row for rows in by_name.values() for row in rows]
        self.missed[claim] = [what for ok, what in every if not ok][:EXAMPLES]
        share = sum(ok for ok, _ in every) / len(every)
        self.claims.append({"claim": claim, "value": share, "at_least": at_least, "unit": "of all"})


def mathematics(tally: Tally, pool: WorkerPool, threads: ThreadPoolExecutor) -> None:
    """Own pairs, golds, solutions."""

    def equal(golds: list[str], said: list[str]) -> list[float | None]:
        return [grade_math(*pair).value for pair in zip(golds, said, strict=True)]

    def found(golds: list[str], texts: list[str]) -> list[float | None]:
        return [o.value for o in outcomes(zip(golds, texts, strict=True), pool, threads)]

    own: Named = {}
    for name, cases, grade in (
        ("answers", answers.cases(), equal),
        ("completions", completions.cases(), found),
    ):
        _, golds, said, want = map(list, zip(*cases, strict=True))
        got = grade(golds, said)
        own[name] = [(g == w, case) for g, w, case in zip(got, want, cases, strict=True)]
    tally.count("our labelled pairs, judged as labelled", own)

    itself, solved, bare, others = ({} for _ in range(4))
    for name in GOLDS:
        rows = data.rows(name)
        golds = [row["answer"] for row in rows]
        turned = golds[1:] + golds[:1]
        ids = [row["id"] for row in rows]  # no gold leaves the data's folder
        itself[name] = [(value == 1, row_id) for value, row_id in zip(equal(golds, golds), ids, strict=True)]
        others[name] = [
            (value == 0 or (value == 1 and answers.alike(gold, other)), (row_id, value))
            for value, gold, other, row_id in zip(equal(golds, turned), golds, turned, ids, strict=True)
        ]
        for kept, texts in (
            (solved, [row["solution"] for row in rows] if name in WITH_SOLUTIONS else []),
            (bare, [unboxed(row["solution"]) for row in rows] if name == "math500" else []),
        ):
            if texts:
                kept[name] = [
                    (value == 1, row_id) for value, row_id in zip(found(golds, texts), ids, strict=True)
                ]
    tally.count("a gold is itself", itself)
    tally.count("the gold is found in the published solution", solved, at_least=0.999)
    tally.count("the same, the box taken away", bare, at_least=0.9)
    tally.count("another row's gold is right only where it is alike", others, at_least=0.999)


def unboxed(solution: str) -> str:
    r"""The text with `\boxed{x}` as plain `x`."""
    for box in boxes(solution)[::-1]:
        solution = solution[: box.start] + box.content + solution[box.end :]
    return solution


def programs(tally: Tally, pool: WorkerPool, threads: ThreadPoolExecutor) -> None:
    """Reference programs, right and broken."""
    named = {name: data.checked_programs(name) for name in ("humaneval", "mbpp")}
    for claim, change, value in (
        ("reference programs pass", str, 1),
        ("the same that return nothing fail", data.broken, 0),
    ):
        kept: Named = {}
        for name, of in named.items():
            jobs = [(change(program), tests) for program, tests in of]
            ran = threads.map(lambda job: run_tests(*job, pool=pool, timeout_s=10), jobs)
            kept[name] = [(outcome.value == value, outcome.detail) for outcome in ran]
        tally.count(claim, kept)


def attacks(tally: Tally, pool: WorkerPool, threads: ThreadPoolExecutor) -> None:
    """Round after round of every attack, then a right program, then what is left of them."""
    every, before = {**FORGERIES, **HARMFUL}, folders()

    def fails(job: tuple[int, str]) -> tuple[bool, Any]:
        number, name = job
        outcome = run_tests(every[name] + f"\n# round {number}", TESTS, timeout_s=1, pool=pool)
        return outcome.value == 0, (name, outcome.value, outcome.detail)

    jobs = [(number, name) for number in range(ROUNDS) for name in every]
    tally.count(f"attacks of {len(every)} kinds score nothing", {"attacks": list(threads.map(fails, jobs))})
    right = [run_tests(f"def f(x): return x + 1\n# {n}", TESTS, pool=pool) for n in range(20)]
    tally.count("right programs after them pass", {"programs": [(o.value == 1, o.detail) for o in right]})
    for what, left in left_behind(pool, before).items():
        tally.claims.append({"claim": f"{what} left behind", "value": left, "at_most": 0, "unit": ""})


def run() -> dict[str, Any]:
    """All of it, on two workers."""
    tally = Tally()
    with WorkerPool(2) as pool, ThreadPoolExecutor(2) as threads:
        for part in (mathematics, programs, attacks):
            part(tally, pool, threads)
        sandbox = active_sandbox(pool)
    return {"claims": tally.claims, "counts": tally.counts, "missed": tally.missed, "sandbox": sandbox}
