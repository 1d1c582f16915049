"""Problems with their published solutions: what students learn from, and worked examples before a question.

Paper  GSM8K's calculator marks and `####` line   arXiv:2110.14168  Sec. 2, App. C
"""

import re
from dataclasses import replace
from pathlib import Path

from pipeline.data.problems import BENCHMARKS, read_problems, source_rows
from pipeline.data.rows import plain
from pipeline.data.shapes import first
from pipeline.settings.common import RowSettings
from rewards.maths.extract import last_boxed
from rollout.types import Problem

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_HASHES = re.compile(r"^[ \t]*####.*\Z", re.MULTILINE | re.DOTALL)
_BREAK = re.compile(r"\s*\n\s*")


def read_solutions(source: str, folder: Path | None, settings: RowSettings) -> list[tuple[Problem, str]]:
    """Problems of `gsm8k_train`, `math_train` or any other source with their published solutions, as they
    stand, "" where there is none. Raises `UserError`: it cannot be read, or too many rows hold no problem."""
    name, rows = source_rows(source, folder)
    settings = replace(settings, fields="") if source in BENCHMARKS else settings
    return [
        (problem, str(first(plain(row, {}), "solution", "completion", "answer") or ""))
        for problem, row in read_problems(rows, name, settings)
    ]  # the hub's GSM8K has the solution under `answer`


def worked_steps(solution: str, answer: str) -> str:
    """A published solution, cleaned: no `<<48/2=24>>`, no `#### 72`, no blank lines, the answer in a box.
    MATH solutions box their answer already, mostly in mid-sentence."""
    steps = _BREAK.sub("\n", _HASHES.sub("", _CALCULATOR.sub("", solution)).strip())
    if steps and last_boxed(steps) is None:
        steps += f"\nThe answer is $\\boxed{{{answer}}}$."
    return steps
