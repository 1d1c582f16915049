"""Problem sets by name: generators, local JSONL files, public benchmarks, any hub data set.

    generator:TASK             pipeline.data.generators; endless, split by construction
    FILE.jsonl                 rows of a shape in `pipeline.data.shapes`; .json, .gz and .parquet too
    math500, aime24, ...       a name in `BENCHMARKS`: its file in --data DIR or $R1_DATA, else the hub's
    hub:OWNER/NAME[:CONFIG]:SPLIT   any data set with such keys
    heldout                    the tiny preset's own held-out set, generator:tiny

Rows that cannot be used are left out and counted (`pipeline.data.rows`). No data travels with the code. A
source that cannot be read is a `UserError` with how to get it.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.generators import Split, generate
from pipeline.data.hub import Hub, hub_rows, parse_hub
from pipeline.data.jsonl import FORMATS, Located, located
from pipeline.data.rows import ALL_ROWS, Tally, to_problem
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings, named_fields
from rewards.maths.gold import check_golds
from rollout.types import Problem

ALIASES = {"heldout": "generator:tiny"}
GENERATED = 320
"""Problems of a generator when no count is given: a standard error below 2.8 points."""
BENCHMARKS = {
    "math500": Hub("HuggingFaceH4/MATH-500", "test"),
    "aime24": Hub("HuggingFaceH4/aime_2024", "train"),
    "aime25": Hub("math-ai/aime25", "test"),
    "amc23": Hub("math-ai/amc23", "test"),
    "gsm8k": Hub("openai/gsm8k", "test", "main"),
    "gsm8k_train": Hub("openai/gsm8k", "train", "main"),
    "math_train": Hub("DigitalLearningGmbH/MATH-lighteval", "train"),
    "humaneval": Hub("openai/openai_humaneval", "test"),
    "mbpp": Hub("google-research-datasets/mbpp", "test", "full"),
    "olympiadbench": Hub("Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP"),
    "minerva_math": Hub("math-ai/minervamath", "test"),
}
"""Public problem sets by name, `*_train` for training: where the hub has them, else as NAME.jsonl."""
FILES = {"gsm8k": "gsm8k_test.jsonl"}
"""Other names of local files."""


def problems(
    source: str,
    *,
    count: int | None = None,
    split: Split = "heldout",
    seed: int = 0,
    data_dir: Path | None = None,
    rows: RowSettings = ALL_ROWS,
) -> list[Problem]:
    """The problems of a source, in its own order. Raises `UserError`: the source is unknown, cannot be read
    or is empty, or too many of its rows are bad.

    Args:
        count: at most this many, from the start; `None` = all, or `GENERATED` of a generator.
        split: of a generator, and of files whose rows name theirs (MBPP: `test` or `train`).
        seed: of a generator; the others do not depend on it.
        data_dir: folder of the benchmarks' files; `None` = $R1_DATA.
        rows: how rows are read; `fields` holds for files and data sets without a name in `BENCHMARKS`.
    """
    source = ALIASES.get(source, source)
    kind, _, rest = source.partition(":")
    if count is not None and count < 1:
        raise UserError(f"{source}: count {count} must be at least 1")
    if kind == "generator":
        return generate(rest, count or GENERATED, split, seed)
    stem, found = source_rows(source, data_folder(data_dir), split)
    rows = replace(rows, fields="") if source in BENCHMARKS else rows
    # A benchmark is scored on all of its problems; one whose gold no rule can check is a verifier failure.
    check = split == "train" or source not in BENCHMARKS
    kept = [problem for problem, _ in read_problems(found, stem, rows, count, check=check)]
    if not kept:
        raise UserError(f"{source} holds no problem; expected one JSON object a line")
    if split == "train" and count == len(kept) and (more := sum(1 for _ in found)):
        print(f"{source}: the first {count:,} problems of {count + more:,} rows are used; --pool takes more")
    return kept


def source_rows(source: str, folder: Path | None, split: Split = "heldout") -> tuple[str, Iterator[Located]]:
    """Name and located rows of a data set of the hub, a benchmark, or a file, in `folder` too.
    Raises `UserError`: the source is none of these, or cannot be read."""
    if source.startswith("hub:"):
        hub = parse_hub(source)
        return hub.path, hub_rows(hub)
    if source in BENCHMARKS:
        return benchmark_rows(source, folder, split)
    if source.endswith(FORMATS) or Path(source).exists():
        path = next((p for p in (Path(source), (folder or Path()) / source) if p.exists()), None)
        if path is None:
            raise UserError(f"no file {source}{f', nor in {folder}' if folder else ''}")
        return path.name.partition(".")[0], located(path)
    raise UserError(
        f"unknown problem set {source!r}; take a FILE.jsonl, generator:tiny, hub:OWNER/NAME:SPLIT "
        f"or one of: {', '.join([*ALIASES, *BENCHMARKS])}"
    )


def read_problems(
    found: Iterator[Located], source: str, rows: RowSettings, count: int | None = None, *, check: bool = True
) -> list[tuple[Problem, Any]]:
    """At most `count` problems, each with its row; bad rows are left out and counted on the console. `check`:
    also rows whose answer no rule can verify. Raises `UserError`: more rows are bad than `rows` allows."""
    fields, tally = named_fields(rows.fields), Tally(source, rows)
    parsed = tally.usable(found, lambda row, i: (to_problem(row, source, i, fields), row))
    kept: list[tuple[Problem, Any]] = []
    while some := list(islice(parsed, None if count is None else count - len(kept))):
        golds = [problem.answer if check and problem.kind == "math" else "1" for _, (problem, _) in some]
        for (where, pair), reason in zip(some, check_golds(golds), strict=True):
            if reason:
                tally.bad(where, f"an answer that cannot be verified: {reason}")
            else:
                kept.append(pair)
    tally.settle()
    return kept


def data_folder(chosen: Path | None) -> Path | None:
    """Where the benchmarks' files lie: the folder that was chosen, else $R1_DATA, else nowhere.
    Raises `UserError`: the chosen folder does not exist."""
    if chosen and not chosen.is_dir():
        raise UserError(f"no folder {chosen}; --data needs the folder of the benchmarks' files")
    return chosen or (Path(os.environ["R1_DATA"]) if os.environ.get("R1_DATA") else None)


def benchmark_rows(name: str, folder: Path | None, split: Split = "heldout") -> tuple[str, Iterator[Located]]:
    """Name and located rows of a benchmark: of its local file, or else of its hub data set."""
    local = FILES.get(name, f"{name}.jsonl")
    part = ("train" if split == "train" else "test") if name == "mbpp" else None
    for file in (folder / local, folder / f"{name}.jsonl") if folder else ():
        if file.is_file():
            rows = located(file)
            if part:
                rows = (r for r in rows if not isinstance(r[1], dict) or r[1].get("split", part) == part)
            return file.stem, rows
    hub = replace(BENCHMARKS[name], split=part or BENCHMARKS[name].split)
    try:
        return name, hub_rows(hub)
    except UserError as error:
        missing = f"{folder} has no {local}" if folder else f"no data folder is set for {local}"
        raise UserError(
            f"{name}: {missing}, and {error}; put {local} in a folder and pass --data FOLDER (or set "
            f"R1_DATA), or go online so that the hub data set {hub.path} can be downloaded"
        ) from error


def order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of `n` items in an epoch. Nothing else decides it: a resumed run needs only its index."""
    items = list(range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(items)
    return items
