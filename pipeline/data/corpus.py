"""A corpus of worked answers: rows that SFT, rejection sampling and distillation share.

Ours are JSON lines. Public traces, of a file or the hub, are put into R1's format:

    question | prompt, completion           ours and TRL's: complete, tags included, or no thinking at all
    problem | question, generation(s)       `<think>..</think>` and the answer after it; of several the first
                                            that the row's own checks (`correctness_*`) found right
    problem | question, and a pair of THOUGHTS      thinking and answer under keys of their own
    messages | conversations                the user's first turn and the assistant's after it (TRL, ShareGPT,
                                            OpenThoughts with its own marks)
    instruction, input, output              Alpaca's: the input follows the instruction

What is left out of rows that are used, such as system prompts, is counted on the console.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.data.hub import hub_rows, parse_hub
from pipeline.data.jsonl import BadRow, JsonObject, located, write_jsonl
from pipeline.data.rows import ALL_ROWS, Tally, check_text, plain
from pipeline.data.shapes import first, json_of, question_of, turns
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings, named_fields

THOUGHTS = {"deepseek_reasoning": "deepseek_solution", "reasoning_content": "content"}
"""Keys of thinking and of its answer (OpenThoughts-114k, distilled instructions)."""
MARKS = re.compile(r"<\|(?:(begin)|end)_of_(?:(thought)|solution)\|>")
"""OpenThoughts-114k's around thinking and answer."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Of the turns of a conversation."""


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


def read_corpus(source: Path | str, count: int = 0, seed: int = 0, rows: RowSettings = ALL_ROWS) -> list[Row]:
    """The rows of a corpus, see `corpus_rows`; at most `count`, sampled by `seed`."""
    return sampled(corpus_rows(source, rows), count, random.Random(f"corpus/{seed}"))


def corpus_rows(source: Path | str, rows: RowSettings = ALL_ROWS) -> Iterator[Row]:
    """The rows of a corpus, a file or `hub:OWNER/NAME[:CONFIG]:SPLIT`, as they are read.
    Raises `UserError`: no such file or data set, no usable row in it, or more bad ones than `rows` allows."""
    hub = parse_hub(str(source)) if str(source).startswith("hub:") else None
    stem, lines = (hub.path, hub_rows(hub)) if hub else (Path(source).stem, located(Path(source)))
    named, tally, left = named_fields(rows.fields), Tally(str(source), rows), Counter[str]()
    found = False
    for _, row in tally.usable(lines, lambda row, i: to_row(plain(row, named), stem, i, left)):
        if row:
            found = True
            yield row
        else:
            left["traces that are not complete, or not right,"] += 1
    tally.settle()
    if left:
        told = ", ".join(f"{what} of {number}" for what, number in sorted(left.items()))
        print(f"{source}: left out {told} of its {tally.total} rows")
    if not found:
        raise UserError(f"{source} has no rows with a complete trace: thinking, </think>, an answer")


def sampled(rows: Iterable[Row], count: int, rng: random.Random) -> list[Row]:
    """`count` rows, each set as likely, or all of them for 0; memory for no more (reservoir sampling)."""
    kept: list[Row] = []
    for i, row in enumerate(rows):
        if not count or i < count:
            kept.append(row)
        elif (at := rng.randrange(i + 1)) < count:
            kept[at] = row
    return kept


def exchange(row: JsonObject, left: Counter[str]) -> tuple[str, str | None]:
    """A conversation's first question, "" without one, and the answer after it; of Alpaca, the output. What
    is not used is counted in `left`. Raises `BadRow`: a turn whose role or text is none."""
    for key in ("messages", "conversations"):
        said, every = turns(value := json_of(row.get(key))), value if isinstance(value, list) else []
        roles = [role for role, _ in said]
        if wrong := next((role for role in roles if role not in ROLES), ""):
            raise BadRow(f"{key}: a turn's role is {wrong!r}; expected one of {', '.join(ROLES)}")
        if len(said) < len(every):
            raise BadRow(f"{key}: {len(every) - len(said)} of {len(every)} turns have no text")
        if "user" in roles:
            at = roles.index("user")
            left.update(["system prompts"] * bool({"system", "developer"} & {*roles[:at]}))
            left.update(["later turns"] * (len(said) > at + 2))
            return said[at][1], said[at + 1][1] if roles[at + 1 : at + 2] == ["assistant"] else None
    return "", row.get("output") if "instruction" in row else None


def to_row(row: JsonObject, source: str, index: int, left: Counter[str]) -> Row | None:
    """A row of any known shape; None of a public one whose trace is not complete, or not right. What it
    leaves out is counted in `left`. Raises `BadRow`: it has another shape, or null where text belongs."""
    name = first(row, "id", "uuid", "unique_id", "question_id")
    values: JsonObject = {"id": f"{source}/{index}" if name is None else str(name), "source": source}
    question, spoken = asked_in(row, left)
    spoken = next((text for role, text in turns(row.get("completion")) if role == "assistant"), spoken)
    if "completion" in row:  # ours and TRL's stand as they are
        own = [field.name for field in fields(Row) if field.name != "id" and field.name in row]
        values |= {key: row[key] for key in own if row[key] is not None or key == "answer"}
        texts = [row["completion"] if spoken is None else spoken]
    else:
        texts = generations(row, spoken)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        shapes = "question and completion, problem and generation(s), or messages"
        raise BadRow(f"not a corpus row; expected the keys {shapes}, with text")
    for text in texts:
        trace = (text, values.get("answer", "")) if "completion" in row else canonical(text)
        if trace is None and text is spoken and "think>" not in MARKS.sub("<think>", str(text)):
            trace = text, ""  # a plain answer; a trace without its end is another matter
        if trace is not None:
            values |= {"question": question.strip(), "completion": trace[0], "answer": trace[1]}
            for key, value in values.items():
                if not isinstance(value, str):
                    raise BadRow(f"{key} is {value!r}, not text")
            check_text(*values.values())
            return Row(**values)
    return None


def asked_in(row: JsonObject, left: Counter[str]) -> tuple[str, str | None]:
    """The question of a plain row of any shape, and the answer of its conversation; see `exchange`.
    Raises `BadRow`: there is no question."""
    asked, spoken = exchange(row, left)
    return asked if asked and not first(row, "question", "problem") else question_of(row), spoken


def generations(row: JsonObject, spoken: str | None) -> list[Any]:
    """The completions of a public row, less those that its own checks did not find right."""
    pairs = ((row.get(thought), row.get(answer)) for thought, answer in THOUGHTS.items())
    parted = [f"<think>{a}</think>{b}" for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
    texts = row.get("generations") or [row.get("generation") or [*parted, spoken][0]]
    checks = [row[key] for key in ("correctness_math_verify", "correctness_llama") if row.get(key)]
    if not checks or not isinstance(texts, list):
        return texts if isinstance(texts, list) else [texts]
    return [text for i, text in enumerate(texts) if any(check[i : i + 1] == [True] for check in checks)]


def canonical(text: str) -> tuple[str, str] | None:
    """A trace in R1's format, and its answer; None of one that is not complete."""
    text = MARKS.sub(lambda mark: f"<{'' if mark[1] else '/'}think>" if mark[2] else "", text)
    thought, _, rest = text.strip().removeprefix("<think>").partition("</think>")
    rest = re.sub(r"<answer>(.*)</answer>", r"\1", rest.strip(), flags=re.DOTALL).strip()
    trace = tagged(thought.strip(), rest)
    return (trace, rest) if split_blocks(trace) and rest else None


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
