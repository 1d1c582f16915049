"""JSON lines, read and written in one place: UTF-8, one object a line.

A line ends at a line feed alone: U+2028 and its like, which `str.splitlines` takes for ends, are text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run.files import write_atomic

JsonObject = dict[str, Any]
Located = tuple[str, JsonObject]
"""A row with its place, for errors."""


def read_jsonl(path: Path, *, torn: bool = False) -> Iterator[tuple[int, JsonObject]]:
    """Number, from 1, and object of each line; blank lines are skipped.

    `torn` leaves out a last line that a kill cut short, possibly within a character.

    Raises:
        UserError: the file cannot be read, or, by file and number, a line is no JSON object.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else {}
            except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a huge number
                if torn and not line.endswith(b"\n"):
                    return
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            if text:
                yield number, row


def located(path: Path) -> Iterator[Located]:
    """The rows of a file, each with its place; raises as `read_jsonl`."""
    return ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def read_log(path: Path) -> list[JsonObject]:
    """The rows of a log that a run appends to: no file is no rows, and a torn last line is left out. Another
    line that is damaged is left out too, and said."""
    rows, damaged = list[JsonObject](), list[str]()
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), 1):
        try:
            row = json.loads(line.decode("utf-8")) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows += [row] if row else []
        else:
            damaged.append(str(number))
    if damaged and damaged[-1] == str(number):  # no line feed follows: torn
        del damaged[-1]
    if damaged:
        print(f"{path}: left out what is damaged: line {', '.join(damaged)}", flush=True)
    return rows


def json_line(row: Mapping[str, Any]) -> str:
    """A row as its line. `errors="backslashreplace"` in the file escapes a lone surrogate as JSON does."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by the rows; it appears complete or not at all."""
    write_atomic(path, map(json_line, rows))
