"""What students learn: worked traces, and the same questions answered without reasoning.

The rows are `pipeline.data.corpus`'s: `completion` is the full text to learn, tags included. Traces
come from the `reject` stage (the teacher's kept samples) or, here, from the published solutions of GSM8K
and MATH. `plain_rows` makes the control that shows what the traces teach.

Paper  distillation from the teacher's kept samples    arXiv:2501.12948  Sec. 2.4
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.data.corpus import Row, tagged
from pipeline.data.decontaminate import decontaminate
from pipeline.data.problems import problems
from pipeline.data.solutions import worked_steps
from rewards.maths.extract import last_boxed, outside_think
from rollout.types import Problem

WORKED = ("gsm8k_train", "math_train")
"""Sources with published solutions."""


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


def worked_rows(solved: Iterable[tuple[Problem, str]], *, tags: bool) -> Iterator[Row]:
    """Published solutions as traces that end in the boxed answer; what has no solution is left out. `tags`
    puts them in R1's format; without, for templates that ask for a box, the solution is as it stands."""
    for problem, solution in solved:
        steps = worked_steps(solution, problem.answer)
        if steps and problem.answer:
            p, text = problem, tagged(steps, f"\\boxed{{{problem.answer}}}") if tags else steps
            yield Row(p.id, p.question.strip(), text, p.answer, p.language, p.kind, p.source)


def apart_from(
    solved: list[tuple[Problem, str]], heldout: Iterable[str], folder: Path | None
) -> list[tuple[Problem, str]]:
    """`solved` less what is a copy or near copy of a problem of the `heldout` benchmarks."""
    tests = [problem for name in heldout for problem in problems(name, data_dir=folder)]
    kept = {problem.id for problem in decontaminate([problem for problem, _ in solved], tests)}
    return [pair for pair in solved if pair[0].id in kept]
