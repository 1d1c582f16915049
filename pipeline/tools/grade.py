"""`python -m pipeline grade IN.jsonl OUT.jsonl`: grade finished completions, or an evaluation again.

Every input line is answered by one output line, in order, whatever it holds: the line's own keys and
`verdict` (correct, incorrect, error), `extracted` and `detail`. No torch here.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, cast, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.data.jsonl import BadRow, JsonObject, json_line, object_of, value_of
from pipeline.data.rows import checked, plain
from pipeline.data.shapes import ANSWERS
from pipeline.errors import UserError
from pipeline.evaluation.generations import regrade
from pipeline.settings.tools import GradeSettings
from rewards.maths.extract import Mode
from rewards.pool import WorkerPool
from rewards.programs.grade import active_sandbox, sandbox_gap
from rewards.reward import Accuracy, Outcome, verdict_of
from rollout.types import Kind, Problem

WINDOW = 256  # lines read ahead of the one being written: enough to keep every worker busy
LONGEST_LINE = 64 << 20  # bytes; a longer one is answered without being read into memory


def grade_file(
    source: Path, out: Path, kind: Kind | None = None, mode: Mode = "lenient", allow_unsafe_code: bool = False
) -> dict[str, int]:
    """Grade the lines of `source`, see `GradeSettings`, into `out`, complete only once this returns.

    Args:
        kind: of all lines; `None` = by the keys of each.
        allow_unsafe_code: run programs too where the kernel cannot confine them; else they are errors.

    Returns:
        Number of lines by verdict.

    Raises:
        ValueError: `kind` or `mode` is unknown, or both files are the same.
        OSError: a file cannot be read or written.
    """
    if kind not in (None, *get_args(Kind)) or mode not in get_args(Mode):
        choices = f"kind={kind!r} must be one of {get_args(Kind)}, mode={mode!r} one of {get_args(Mode)}"
        raise ValueError(f"{choices}.")
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the input itself. Name another output file.")
    counts: Counter[str] = Counter(correct=0, incorrect=0, error=0)
    lines_done = TextColumn("{task.fields[lines]} lines")
    columns = (TextColumn("grading"), BarColumn(), lines_done, TimeRemainingColumn())
    with (
        source.open("rb") as lines,
        out.open("w", encoding="utf-8", errors="backslashreplace") as graded,
        WorkerPool(allow_unsafe_code=allow_unsafe_code) as pool,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        accuracy = Accuracy(mode, pool=pool)
        task = bar.add_task("", total=os.fstat(lines.fileno()).st_size, lines=0)
        programs = False
        for done, (size, row) in enumerate(_graded(_lines(lines), accuracy, kind, pool), 1):
            graded.write(json_line(row))
            counts[row["verdict"]] += 1
            programs = programs or "tests" in row
            bar.update(task, advance=size, lines=done)
        if programs and kind != "math":
            active, gap = active_sandbox(pool), sandbox_gap(pool)
            refused = f"not run: {gap}; --allow-unsafe-code runs them all the same"
            told = f"confined by {active}" if allow_unsafe_code or not gap else refused
            bar.console.print(f"grade: programs were {told}", soft_wrap=True)
    return dict(counts)


def _lines(source: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its size in bytes; `None` for one that is longer than `LONGEST_LINE`."""
    while line := source.readline(LONGEST_LINE):
        size, complete = len(line), len(line) < LONGEST_LINE or line.endswith(b"\n")
        while not complete and (rest := source.readline(LONGEST_LINE)):
            size += len(rest)
            line, complete = b"", rest.endswith(b"\n")
        yield size, line if line and len(line) < LONGEST_LINE else None


def _graded(
    lines: Iterable[tuple[int, bytes | None]], accuracy: Accuracy, kind: str | None, pool: WorkerPool
) -> Iterator[tuple[int, JsonObject]]:
    """Each line's size and answer, in order, at most `WINDOW` of them in work at once."""
    waiting: deque[tuple[int, JsonObject, Outcome | Future[Outcome]]] = deque()
    for number, (size, line) in enumerate(lines, 1):
        waiting.append((size, *_grade_line(number, line, accuracy, kind, pool)))
        if len(waiting) >= WINDOW:
            yield _answered(*waiting.popleft())
    yield from (_answered(*line) for line in waiting)


def _answered(size: int, row: JsonObject, outcome: Outcome | Future[Outcome]) -> tuple[int, JsonObject]:
    try:
        outcome = outcome.result() if isinstance(outcome, Future) else outcome
    except Exception as error:
        outcome = _failed(error)
    verdict = {"verdict": verdict_of(outcome), "extracted": outcome.extracted, "detail": outcome.detail}
    return size, row | verdict


def _failed(error: Exception) -> Outcome:
    text = str(error) if isinstance(error, BadRow) else f"{type(error).__name__}: {error}"
    return Outcome(None, text[:500])


def _grade_line(
    number: int, line: bytes | None, accuracy: Accuracy, kind: str | None, pool: WorkerPool
) -> tuple[JsonObject, Outcome | Future[Outcome]]:
    """The keys and the outcome, at once or, of programs and algebra, from a worker. Nothing escapes."""
    try:
        row = object_of(BadRow(f"longer than {LONGEST_LINE} bytes") if line is None else value_of(line))
    except BadRow as error:
        return {"line": number}, _failed(BadRow(f"line {number}: {error}"))
    try:
        problem, completion = _problem(row, kind)
        quick, _ = accuracy.quick(problem, completion)
        return row, quick or pool.submit(accuracy, problem, completion)
    except Exception as error:
        return row, _failed(error)


def _problem(row: JsonObject, kind: str | None) -> tuple[Problem, str]:
    """What to check, read as rows of problems are, and the completion to check it on."""
    completion = row.get("completion")
    if not isinstance(completion, str):
        raise BadRow("`completion` is missing or not a string")
    named = plain({key: row[key] for key in row if key != "completion"}, {}) | {"question": "?"}
    if kind in ("math", "general"):
        named = {key: value for key, value in named.items() if key in ("question", *ANSWERS, "solution")}
    asked = checked(named, {})
    if kind == "code" and not asked.tests:
        raise BadRow("no tests")
    shown = row.get("shown", len(asked.tests))
    if not isinstance(shown, int) or shown < 0:
        raise BadRow("`shown` is not a number of tests")
    kind = "code" if asked.tests else "general" if kind == "general" else "math"
    return Problem("", cast(Kind, kind), "", asked.answer, asked.tests, shown=shown), completion


def main(config: GradeSettings) -> None:
    """The command; its last line on stdout is the number of lines by verdict, of a folder more."""
    if config.source.is_dir():
        print(json.dumps(regrade(config)))
        return
    try:
        unsafe = config.allow_unsafe_code
        counts = grade_file(config.source, config.out, config.kind, config.mode, unsafe)
    except OSError as error:
        path = error.filename or config.out
        raise UserError(f"grade: {path}: {error.strerror or error}; name another file") from error
    except ValueError as error:
        raise UserError(f"grade: {error}") from error
    print(json.dumps(counts))
