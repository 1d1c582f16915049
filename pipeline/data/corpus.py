"""A corpus of worked answers: JSONL rows that SFT, rejection sampling and distillation share."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.data.jsonl import read_jsonl, write_jsonl
from pipeline.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One question with a complete completion."""

    id: str
    question: str
    completion: str
    """`<think>..</think><answer>..</answer>`, any prefill included."""
    answer: str = ""
    """The text of the answer block."""
    language: str = "en"
    kind: str = "math"
    source: str = ""


def read_corpus(path: Path) -> list[Row]:
    """The rows of a corpus file.

    Raises:
        UserError: missing or empty file, or by its number a malformed line.
    """
    names = {field.name for field in fields(Row)}
    rows = []
    for number, row in read_jsonl(path):
        try:
            rows.append(Row(**{k: v for k, v in row.items() if k in names}))
        except TypeError as error:
            raise UserError(
                f"{path}:{number}: not a corpus row (id, question, completion, ...): {error}"
            ) from error
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def write_corpus(path: Path, rows: Iterable[Row]) -> None:
    """Write rows; the file appears complete or not at all."""
    write_jsonl(path, map(asdict, rows))


BLOCKS = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*<answer>\s*(.*?)\s*</answer>\s*", re.DOTALL)


def split_blocks(completion: str) -> tuple[str, str] | None:
    """Thought and answer of a completion in R1's format; `None` of any other."""
    match = BLOCKS.fullmatch(completion)
    if not match or re.search(r"</?(think|answer)>", match[1] + match[2]):
        return None
    return match[1], match[2]


def readable(thought: str) -> bool:
    """No line occurs twice: the repetition filter of the cold start and of rejection sampling."""
    lines = [line.strip() for line in thought.splitlines() if line.strip()]
    return bool(lines) and len(lines) == len(set(lines))
