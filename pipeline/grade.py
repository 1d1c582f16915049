"""`python -m pipeline grade IN.jsonl OUT.jsonl`: grade finished completions.

Every input line is answered by one output line, in order, whatever it holds: the line's own keys and
`verdict` (correct, incorrect, error), `extracted` and `detail`. No torch here.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rewards.extract import Mode
from rewards.reward import Accuracy, Outcome, verdict_of
from rewards.workers import WorkerPool
from rollout.types import Problem, StdioTest

WINDOW = 256  # lines read ahead of the one being written: enough to keep every worker busy

Kind = Literal["math", "code", "general"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Grade the completions of a JSONL file."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.jsonl")]
    """Lines with `completion`, and `answer` (mathematics) or `tests` (code: Python statements, or objects
    with `input` and `output`)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    """The same lines with `verdict`, `extracted` and `detail`. Replaced where it exists."""
    kind: Kind | None = None
    """What the completions are; by default code where a line has `tests`, else mathematics."""
    mode: Mode = "lenient"
    """How the final answer is looked for: lenient to evaluate, strict as in training."""


class _BadLine(ValueError):
    """An input line that cannot be graded; the message says why."""


def grade_file(source: Path, out: Path, kind: str | None = None, mode: str = "lenient") -> dict[str, int]:
    """Grade the lines of `source` into `out`.

    Args:
        source: JSONL, see `Args`.
        out: Where to write; only complete once this returns.
        kind: `math`, `code`, `general`, or `None` to tell by the keys of each line.
        mode: `lenient` or `strict`.

    Returns:
        Number of lines by verdict.

    Raises:
        ValueError: `kind` or `mode` is unknown, or both files are the same.
        OSError: A file cannot be read or written.
    """
    if kind not in (None, *get_args(Kind)) or mode not in get_args(Mode):
        raise ValueError(
            f"kind={kind!r} must be one of {get_args(Kind)}, mode={mode!r} one of {get_args(Mode)}."
        )
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the input itself. Name another output file.")
    counts: Counter[str] = Counter(correct=0, incorrect=0, error=0)
    columns = (
        TextColumn("grading"),
        BarColumn(),
        TextColumn("{task.fields[lines]} lines"),
        TimeRemainingColumn(),
    )
    with (
        WorkerPool() as pool,
        ThreadPoolExecutor(pool.size) as threads,
        Progress(*columns, console=Console(stderr=True)) as bar,
        source.open("rb") as lines,
        out.open("wb") as graded,
    ):
        accuracy = Accuracy("strict" if mode == "strict" else "lenient", pool=pool)
        task = bar.add_task("", total=os.fstat(lines.fileno()).st_size, lines=0)
        for done, (line, row) in enumerate(_graded(lines, accuracy, kind, threads), 1):
            graded.write(_encoded(row))
            counts[row["verdict"]] += 1
            bar.update(task, advance=len(line), lines=done)
    return dict(counts)


def _graded(
    lines: Iterable[bytes], accuracy: Accuracy, kind: str | None, threads: ThreadPoolExecutor
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its answer, in order, `WINDOW` of them under way at once."""
    waiting: deque[tuple[bytes, Future[dict[str, Any]]]] = deque()
    for number, line in enumerate(lines, 1):
        waiting.append((line, threads.submit(_grade_line, number, line, accuracy, kind)))
        if len(waiting) >= WINDOW:
            first, answer = waiting.popleft()
            yield first, answer.result()
    for rest, answer in waiting:
        yield rest, answer.result()


def _grade_line(number: int, line: bytes, accuracy: Accuracy, kind: str | None) -> dict[str, Any]:
    """The answer to one line. Nothing escapes: whatever goes wrong is this line's `detail`."""
    row: dict[str, Any] = {"line": number}
    try:
        row = _parse(number, line)
        problem, completion = _problem(row, kind)
        outcome = accuracy(problem, completion)
    except _BadLine as bad:
        outcome = Outcome(None, str(bad))
    except Exception as error:
        outcome = Outcome(None, f"{type(error).__name__}: {error}"[:500])
    return row | {"verdict": verdict_of(outcome), "extracted": outcome.extracted, "detail": outcome.detail}


def _parse(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"line {number} is not JSON: {error}"[:500]) from error
    if not isinstance(row, dict):
        raise _BadLine(f"line {number} is not an object but {type(row).__name__}")
    return row


def _problem(row: dict[str, Any], kind: str | None) -> tuple[Problem, str]:
    """What to check and the completion to check it on."""
    completion = row.get("completion")
    if not isinstance(completion, str):
        raise _BadLine("`completion` is missing or not a string")
    kind = kind or ("code" if "tests" in row else "math")
    if kind == "code":
        return Problem("", "code", "", tests=_tests(row.get("tests"))), completion
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise _BadLine("`answer` is missing, or neither text nor a number")
    return Problem("", "general" if kind == "general" else "math", "", answer=str(answer)), completion


def _tests(tests: object) -> tuple[str | StdioTest, ...]:
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not tests:
        raise _BadLine("`tests` is missing, empty, or neither a list nor text")
    out: list[str | StdioTest] = []
    for test in tests:
        match test:
            case str():
                out.append(test)
            case {"input": str(given), "output": str(wanted)}:
                out.append(StdioTest(given, wanted))
            case _:
                raise _BadLine(
                    "a test is neither a statement nor an object with `input` and `output` as text"
                )
    return tuple(out)


def _encoded(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(row).encode() + b"\n"


def main(argv: list[str]) -> int:
    """The command line; the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m pipeline grade")
    try:
        counts = grade_file(args.source, args.out, args.kind, args.mode)
    except (OSError, ValueError) as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    print(json.dumps(counts))
    return 0
