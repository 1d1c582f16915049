"""The data card of a corpus, README.md in the form of the hub's dataset cards, made from its rows."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.corpus import Row
from rollout.text.tokenizer import as_data, encode_text

COLUMNS = ("mean", "median", "90 %", "99 %", "longest")
CARD = """---
language: [{}]
task_categories: [text-generation]
size_categories: [{}]
tags: [reasoning, rejection-sampling]
configs: [{{config_name: default, data_files: corpus.jsonl}}]
---
# Rejection-sampled corpus

One JSON object a line: `id`, `question`, `completion`, `answer`, `language`, `kind`, `source`. Questions have
their sources' licences, completions the teacher's terms.

{}

## Settings

```toml
{}```
"""


def lengths(values: Iterable[int]) -> list[int]:
    """Mean, rounded, and nearest-rank quantiles: what `COLUMNS` names."""
    found = sorted(values)
    ranks = (math.ceil(share * len(found)) - 1 for share in (0.5, 0.9, 0.99, 1))
    return [round(sum(found) / len(found)), *(found[rank] for rank in ranks)]


def corpus_card(
    rows: Sequence[Row],
    facts: Mapping[str, object],
    fates: Mapping[str, int],
    toml: str,
    of: Tokenizer | None,
) -> tuple[str, str]:
    """The card of corpus.jsonl, and the lengths of its completions in one line; in tokens too with the
    tokenizer `of` the teacher. `fates`: sampled completions by what became of them; `toml`: the settings."""
    sizes = {"question, characters": lengths(len(row.question) for row in rows)}
    sizes["completion, characters"] = lengths(len(row.completion) for row in rows)
    if of:
        sizes["completion, tokens"] = lengths(len(encode_text(of, as_data(of, r.completion))) for r in rows)
    groups = {key: Counter(getattr(row, key) for row in rows) for key in ("source", "kind", "language")}
    counts = [(f"{key} {name}", n) for key, found in groups.items() for name, n in sorted(found.items())]
    tables: list[list[Sequence[object]]] = [
        [("origin", ""), *facts.items()],
        [("sampled completions", "number"), *fates.items()],
        [("rows", len(rows)), *counts],
        [("length", *COLUMNS), *((name, *values) for name, values in sizes.items())],
    ]
    for table in tables:
        table.insert(1, ["---"] * len(table[0]))
    lines = [[" | ".join(str(c).replace("|", "\\|") for c in line) for line in table] for table in tables]
    text = "\n\n".join("\n".join(f"| {line} |" for line in table) for table in lines)
    most = len(str(len(rows))) - 3
    size = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")[min(4, max(0, most))]
    said = ", ".join(f"{column} {n:,}" for column, n in zip(COLUMNS, [*sizes.values()][-1], strict=True))
    return CARD.format(", ".join(sorted(groups["language"])), size, text, toml), f"{[*sizes][-1]}: {said}"
