"""A corpus of worked answers: rows that SFT, rejection sampling and distillation share.

Ours are JSON lines. Public traces, a JSONL file or a data set of the hub, are put into R1's format:

    question, completion                    ours: complete, tags included
    problem | question, generation(s)       `<think>..</think>` and the answer after it; of several the first
                                            that the row's own checks (`correctness_*`) found right
    messages                                the same, a user's turn and an assistant's
"""

import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.data.hub import hub_rows, parse_hub
from pipeline.data.jsonl import JsonObject, located, write_jsonl
from pipeline.data.rows import first
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


def read_corpus(source: Path | str, count: int = 0, seed: int = 0) -> list[Row]:
    """The rows of a corpus, a file or `hub:OWNER/NAME[:CONFIG]:SPLIT`; at most `count`, sampled by `seed`.

    Raises:
        UserError: no such file or data set, one without a usable row, or by its number a malformed row.
    """
    hub = parse_hub(str(source)) if str(source).startswith("hub:") else None
    stem, lines = (hub.path, hub_rows(hub)) if hub else (Path(source).stem, located(Path(source)))
    found = (to_row(row, where, stem, i) for i, (where, row) in enumerate(lines))
    rows = sampled((row for row in found if row), count, random.Random(f"corpus/{seed}"))
    if not rows:
        raise UserError(f"{source} has no rows with a complete trace")
    return rows


def sampled(rows: Iterable[Row], count: int, rng: random.Random) -> list[Row]:
    """`count` rows, each set as likely, or all of them for 0; memory for no more (reservoir sampling)."""
    kept: list[Row] = []
    for i, row in enumerate(rows):
        if not count or i < count:
            kept.append(row)
        elif (at := rng.randrange(i + 1)) < count:
            kept[at] = row
    return kept


def to_row(row: JsonObject, where: str, source: str, index: int) -> Row | None:
    """A row of any known shape; None of a public one whose trace is not complete, or not right.

    Raises:
        UserError: it has another shape.
    """
    if "completion" in row:
        names = {field.name for field in fields(Row)}
        try:
            return Row(**{k: v for k, v in row.items() if k in names})
        except TypeError as error:
            raise UserError(f"{where}: not a corpus row (id, question, completion, ...): {error}") from error
    messages = row["messages"] if isinstance(row.get("messages"), list) else []
    turns = {turn.get("role"): turn.get("content") for turn in reversed(messages) if isinstance(turn, dict)}
    question = first(row, "question", "problem") or turns.get("user")
    texts = row.get("generations") or [row.get("generation") or turns.get("assistant")]
    if not isinstance(question, str) or not all(isinstance(text, str) for text in texts):
        shapes = "question and completion, problem and generation(s), or messages"
        raise UserError(f"{where}: not a corpus row; expected the keys {shapes}")
    checks = [row[key] for key in ("correctness_math_verify", "correctness_llama") if row.get(key)]
    right = (
        t for i, t in enumerate(texts) if not checks or any(check[i : i + 1] == [True] for check in checks)
    )
    for text in right:
        thought, _, rest = text.strip().removeprefix("<think>").partition("</think>")
        trace = tagged(thought.strip(), rest.strip())
        if split_blocks(trace) and rest.strip():
            name = first(row, "id", "uuid") or f"{source}/{index}"
            return Row(str(name), question.strip(), trace, rest.strip(), source=source)
    return None


def write_corpus(path: Path, rows: Iterable[Row]) -> None:
    """Write rows; the file appears complete or not at all."""
    write_jsonl(path, map(asdict, rows))


BLOCKS = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*<answer>\s*(.*?)\s*</answer>\s*", re.DOTALL)


def tagged(thought: str, answer: str) -> str:
    """R1's output format, as one canonical text."""
    return f"<think>\n{thought}\n</think>\n<answer>{answer}</answer>"


def split_blocks(completion: str) -> tuple[str, str] | None:
    """Thought and answer of a completion in R1's format; `None` of any other."""
    match = BLOCKS.fullmatch(completion)
    if not match or re.search(r"</?(think|answer)>", match[1] + match[2]):
        return None
    return match[1], match[2]


MARKUP = re.compile(r"\\(?:begin|end)\{[^}]*\}")


def readable(thought: str) -> bool:
    """At most a tenth of the lines are repeated, lines of mere markup (`\\[`) not counted: the repetition
    filter of the cold start and of rejection sampling."""
    lines = [line.strip() for line in thought.splitlines()]
    lines = [line for line in lines if any(map(str.isalnum, MARKUP.sub("", line)))]
    return bool(lines) and len(lines) - len(set(lines)) <= len(lines) // 10
