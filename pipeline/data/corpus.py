"""A corpus of worked answers: JSONL rows that SFT, rejection sampling and distillation share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One question with a whole completion."""

    id: str
    question: str
    completion: str
    """`<think>..</think><answer>..</answer>`, any prefill included."""
    answer: str = ""
    """What stands in the answer block."""
    language: str = "en"
    kind: str = "math"
    source: str = ""


def read_corpus(path: Path) -> list[Row]:
    """The rows of a corpus file.

    Raises:
        UserError: missing or empty file, or a malformed line, by its number.
    """
    names = {field.name for field in fields(Row)}
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the corpus {path}: {error}") from error
    if not text:
        raise UserError(f"{path} has no rows")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 is text
        try:
            rows.append(Row(**{k: v for k, v in json.loads(line).items() if k in names}))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} line {number} is not a corpus row (id, question, completion, ...): {error}"
            ) from error
    return rows


def write_corpus(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, whole or not at all."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)


BLOCKS = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*<answer>\s*(.*?)\s*</answer>\s*", re.DOTALL)


def split_blocks(completion: str) -> tuple[str, str] | None:
    """Thought and answer of a completion in R1's format; None when it is not in it."""
    match = BLOCKS.fullmatch(completion)
    if not match or re.search(r"</?(think|answer)>", match[1] + match[2]):
        return None
    return match[1], match[2]


def readable(thought: str) -> bool:
    """No line said twice: the repetition filter of the cold start and of rejection sampling."""
    lines = [line.strip() for line in thought.splitlines() if line.strip()]
    return bool(lines) and len(lines) == len(set(lines))
