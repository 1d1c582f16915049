"""Files of rows, read and written in one place: JSON lines, UTF-8, one object a line; arrays and tables too.

A line ends at a line feed alone: U+2028 and its like, which `str.splitlines` takes for ends, are text.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run.files import write_atomic

JsonObject = dict[str, Any]
Located = tuple[str, Any]
"""A row, or a `BadRow`, with its place, for errors."""
FORMATS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, without its place."""


def located(path: Path) -> Iterator[Located]:
    """The rows of a file of `FORMATS`, each with its place: of JSON lines, of one JSON array, or of a table.
    Raises `UserError`: the file cannot be read."""
    try:
        if path.is_dir():
            files = ", ".join(sorted(file.name for file in path.iterdir() if file.name.endswith(FORMATS)))
            raise UserError(f"{path} is a folder; name one of its files: {files or 'it has none of rows'}")
        if path.suffix == ".parquet":
            import pyarrow.parquet  # takes its time, and comes with datasets

            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1_000)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            array = value_of(file.read()) if start.startswith(b"[") else None
            if isinstance(array, list):  # and not lines that are arrays
                yield from ((f"{path} row {number}", row) for number, row in enumerate(array, 1))
                return
            file.seek(0)
            lines = ((number, value_of(line)) for number, line in enumerate(file, 1))
            yield from ((f"{path}:{number}", row) for number, row in lines if row is not None)
    except (OSError, EOFError, zlib.error, ImportError, ValueError) as error:  # pyarrow's are ValueErrors
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"cannot read {path}: {why}") from error


def object_of(row: Any) -> JsonObject:
    """`row`, an object; a `BadRow` of `located` and anything else is raised as one."""
    if not isinstance(row, dict):
        found = f"expected a JSON object, found {type(row).__name__}"
        raise row if isinstance(row, BadRow) else BadRow(found)
    return row


def value_of(line: bytes) -> Any:
    """The value of a line (or a file) of JSON, a `BadRow`, or None of a blank one."""
    try:
        text = line.decode("utf-8-sig").strip()
        null = BadRow("expected a JSON object, found NoneType")
        return (json.loads(text) if text != "null" else null) if text else None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a huge number
        return BadRow(f"not a line of JSON ({error})")


def read_log(path: Path) -> list[JsonObject]:
    """The rows of a log that a run appends to: no file is no rows, and a torn last line is left out. Another
    line that is damaged is left out too, and said."""
    rows, damaged = list[JsonObject](), list[int]()
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, row in enumerate(map(value_of, lines), 1):
        if isinstance(row, dict):
            rows += [row] if row else []
        elif row is not None and number < len(lines):  # no line feed follows the last: torn
            damaged.append(number)
    if damaged:
        print(f"{path}: left out what is damaged: line {', '.join(map(str, damaged))}", flush=True)
    return rows


def json_line(row: Mapping[str, Any]) -> str:
    """A row as its line. `errors="backslashreplace"` in the file escapes a lone surrogate as JSON does."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by the rows; it appears complete or not at all."""
    write_atomic(path, map(json_line, rows))
