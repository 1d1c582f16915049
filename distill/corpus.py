"""What students learn: worked traces, and the same questions answered without reasoning.

The rows are `pipeline.data.corpus`'s: `completion` is the full text to learn, tags included. Traces
come from the `reject` stage (the teacher's kept samples) or, here, from the published solutions of GSM8K
and MATH. `plain_rows` makes the control that shows what the traces teach.

Papers  distillation from the teacher's kept samples    arXiv:2501.12948  Sec. 2.4
        GSM8K's calculator marks and `####` line        arXiv:2110.14168  Sec. 2, App. C
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.data.corpus import Row, tagged
from pipeline.data.decontaminate import decontaminate
from pipeline.data.problems import benchmark_rows, problems, read_problems
from pipeline.settings.common import RowSettings
from rewards.maths.extract import last_boxed, outside_think
from rollout.types import Problem

WORKED = ("gsm8k_train", "math_train")
"""Sources with published solutions."""

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_HASHES = re.compile(r"^[ \t]*####.*\Z", re.MULTILINE | re.DOTALL)
_BREAK = re.compile(r"\s*\n\s*")


def plain_rows(rows: Iterable[Row]) -> list[Row]:
    """The same questions, answered without reasoning. What stands outside the think block is kept as it is
    (`<answer>7</answer>`); a worked solution without tags shrinks to its box. Others are left out."""
    plain = []
    for row in rows:
        answer = row.answer or last_boxed(row.completion)
        completion = f"\\boxed{{{answer}}}" if answer else ""
        if "</think>" in row.completion:
            completion = outside_think(row.completion).strip()
        if completion:
            plain.append(replace(row, completion=completion))
    return plain


def read_solutions(source: str, folder: Path | None, settings: RowSettings) -> list[tuple[Problem, str]]:
    """Problems of `gsm8k_train` or `math_train` with their published solutions, from `folder` or the hub.
    Raises `UserError`: neither can be read, or too many rows hold no problem."""
    _, rows = benchmark_rows(source, folder)
    return [
        (problem, str(row.get("solution") or row.get("answer") or ""))
        for problem, row in read_problems(rows, source, replace(settings, fields=""))
    ]  # the hub's GSM8K has the solution under `answer`


def worked_rows(solved: Iterable[tuple[Problem, str]], *, tags: bool) -> Iterator[Row]:
    """Published solutions as traces that end in the boxed answer; what has no solution is left out. `tags`
    puts them in R1's format; without, for templates that ask for a box, the solution is as it stands."""
    for problem, solution in solved:
        steps = worked_steps(solution, problem.answer)
        if steps and problem.answer:
            p, text = problem, tagged(steps, f"\\boxed{{{problem.answer}}}") if tags else steps
            yield Row(p.id, p.question.strip(), text, p.answer, p.language, p.kind, p.source)


def worked_steps(solution: str, answer: str) -> str:
    """A published solution, cleaned: no `<<48/2=24>>`, no `#### 72`, no blank lines, the answer in a box.
    MATH solutions box their answer already, mostly in mid-sentence."""
    steps = _BREAK.sub("\n", _HASHES.sub("", _CALCULATOR.sub("", solution)).strip())
    if steps and last_boxed(steps) is None:
        steps += f"\nThe answer is $\\boxed{{{answer}}}$."
    return steps


def apart_from(
    solved: list[tuple[Problem, str]], heldout: Iterable[str], folder: Path | None
) -> list[tuple[Problem, str]]:
    """`solved` less what is a copy or near copy of a problem of the `heldout` benchmarks."""
    tests = [problem for name in heldout for problem in problems(name, data_dir=folder)]
    kept = {problem.id for problem in decontaminate([problem for problem, _ in solved], tests)}
    return [pair for pair in solved if pair[0].id in kept]
