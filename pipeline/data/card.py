"""The data card of a corpus: README.md in the form of the hub's dataset cards, made from the rows themselves."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.corpus import Row
from rollout.text.tokenizer import as_data, encode_text

SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
"""The hub's names for numbers of rows."""
COLUMNS = ("mean", "median", "90 %", "99 %", "longest")


def lengths(values: Iterable[int]) -> list[int]:
    """Mean, rounded, and nearest-rank quantiles: what `COLUMNS` names."""
    found = sorted(values)
    ranks = (max(0, math.ceil(share * len(found)) - 1) for share in (0.5, 0.9, 0.99, 1.0))
    return [round(sum(found) / len(found)), *(found[rank] for rank in ranks)]


def length_table(rows: Sequence[Row], tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    """`lengths` of questions and completions in characters; with a tokenizer, of completions in tokens."""
    table = {
        "question, characters": lengths(len(row.question) for row in rows),
        "completion, characters": lengths(len(row.completion) for row in rows),
    }
    if tokenizer is not None:
        ids = (encode_text(tokenizer, as_data(tokenizer, row.completion)) for row in rows)
        table["completion, tokens"] = lengths(map(len, ids))
    return table


def length_line(table: Mapping[str, list[int]]) -> str:
    """The last row of a `length_table`, in one line for the console."""
    name, values = list(table.items())[-1]
    return f"{name}: " + ", ".join(f"{column} {v:,}" for column, v in zip(COLUMNS, values, strict=True))


def markdown(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A table; numbers with thousands separators."""
    lines = [head, ["---"] * len(head), *body]
    cells = ([f"{v:,}" if isinstance(v, int) else str(v).replace("|", "\\|") for v in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def corpus_card(
    title: str,
    rows: Sequence[Row],
    facts: Mapping[str, str],
    counts: Mapping[str, int],
    table: Mapping[str, list[int]],
) -> str:
    """The card of `corpus.jsonl`.

    Args:
        facts: where problems and answers come from and how they were sampled, by name.
        counts: sampled completions by what became of them.
        table: from `length_table`.
    """
    size = next((name for most, name in SIZES if len(rows) < most), "n>10M")
    front = f"language: [{', '.join(sorted({row.language for row in rows}))}]\n"
    front += f"task_categories: [text-generation]\nsize_categories: [{size}]\ntags: [reasoning, rejection-sampling]\n"
    front += "configs:\n- config_name: default\n  data_files: corpus.jsonl"
    groups = [(name, Counter(getattr(row, name) for row in rows)) for name in ("source", "kind", "language")]
    by = [(f"{name} {value or '–'}", n) for name, found in groups for value, n in sorted(found.items())]
    of = [(name, *values) for name, values in table.items()]
    return f"""---
{front}
---
# {title}

{len(rows):,} questions with a complete completion each: `id`, `question`, `completion`, `answer`, `language`, `kind`,
`source`, one JSON object a line. Questions have their sources' licences, completions the teacher's terms.

## Origin

{markdown(("", ""), facts.items())}

## Filters

{markdown(("sampled completions", "number"), counts.items())}

## Contents

{markdown(("rows", "number"), by)}

{markdown(("length", *COLUMNS), of)}
"""
