"""The data card of a corpus, README.md in the form of the hub's dataset cards, made from the rows themselves."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.corpus import Row
from rollout.text.tokenizer import as_data, encode_text

COLUMNS = ("mean", "median", "90 %", "99 %", "longest")
CARD = """---
language: [{languages}]
task_categories: [text-generation]
size_categories: [{size}]
tags: [reasoning, rejection-sampling]
configs:
- config_name: default
  data_files: corpus.jsonl
---
# {title}

One JSON object a line: `id`, `question`, `completion`, `answer`, `language`, `kind`, `source`. Questions have
their sources' licences, completions the teacher's terms.

{tables}
"""


def lengths(values: Iterable[int]) -> list[int]:
    """Mean, rounded, and nearest-rank quantiles: what `COLUMNS` names."""
    found = sorted(values)
    ranks = (math.ceil(share * len(found)) - 1 for share in (0.5, 0.9, 0.99, 1))
    return [round(sum(found) / len(found)), *(found[rank] for rank in ranks)]


def corpus_card(
    title: str,
    rows: Sequence[Row],
    facts: Mapping[str, str],
    fates: Mapping[str, int],
    tokenizer: Tokenizer | None,
) -> tuple[str, str]:
    """The card of `corpus.jsonl`, and the lengths of its completions in one line.

    Args:
        facts: where questions and answers come from, by name.
        fates: sampled completions by what became of them.
        tokenizer: counts tokens beside characters.
    """
    sizes = {"question, characters": lengths(len(row.question) for row in rows)}
    sizes["completion, characters"] = lengths(len(row.completion) for row in rows)
    if tokenizer:
        ids = (encode_text(tokenizer, as_data(tokenizer, row.completion)) for row in rows)
        sizes["completion, tokens"] = lengths(map(len, ids))
    groups = {key: Counter(getattr(row, key) for row in rows) for key in ("source", "kind", "language")}
    tables = [
        [("origin", ""), *facts.items()],
        [("sampled completions", "number"), *fates.items()],
        [
            ("rows", len(rows)),
            *((f"{k} {name}", n) for k, of in groups.items() for name, n in sorted(of.items())),
        ],
        [("length", *COLUMNS), *((name, *values) for name, values in sizes.items())],
    ]
    for table in tables:
        table.insert(1, ["---"] * len(table[0]))
    cells = [[[str(cell).replace("|", "\\|") for cell in line] for line in table] for table in tables]
    text = "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in cells)
    size = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")[
        min(4, max(0, len(str(len(rows))) - 3))
    ]
    languages = ", ".join(sorted(groups["language"]))
    line = ", ".join(
        f"{column} {value:,}" for column, value in zip(COLUMNS, [*sizes.values()][-1], strict=True)
    )
    return CARD.format(title=title, size=size, languages=languages, tables=text), f"{[*sizes][-1]}: {line}"
