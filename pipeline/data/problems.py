"""Problem sets by name: generators, local JSONL files, public benchmarks, any hub data set.

    generator:TASK             pipeline.data.generators; endless, split by construction
    FILE.jsonl                 one problem a line: question|problem|prompt, answer|solution or tests
    math500, aime24, ...       a name in `BENCHMARKS`: its file in --data DIR or $R1_DATA, else the hub's
    hub:OWNER/NAME[:CONFIG]:SPLIT   any data set with such keys
    heldout                    the tiny preset's own held-out set, generator:tiny

No data travels with the code. A source that cannot be read is a `UserError` with how to get it.
"""

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.data.generators import Split, generate
from pipeline.data.hub import Hub, hub_rows, parse_hub
from pipeline.data.jsonl import JsonObject, Located, located
from pipeline.data.rows import to_problem
from pipeline.errors import UserError
from rollout.types import Problem

ALIASES = {"heldout": "generator:tiny"}
GENERATED = 320
"""Problems of a generator when no count is given: a standard error below 2.8 points."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A public problem set."""

    file: str
    """Its name as a local file."""
    hub: Hub
    train: bool = False
    """A training set: no benchmark at all, but read in the same way."""


BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark("math500.jsonl", Hub("HuggingFaceH4/MATH-500", "test")),
    "aime24": Benchmark("aime24.jsonl", Hub("HuggingFaceH4/aime_2024", "train")),
    "aime25": Benchmark("aime25.jsonl", Hub("math-ai/aime25", "test")),
    "amc23": Benchmark("amc23.jsonl", Hub("math-ai/amc23", "test")),
    "gsm8k": Benchmark("gsm8k_test.jsonl", Hub("openai/gsm8k", "test", "main")),
    "gsm8k_train": Benchmark("gsm8k_train.jsonl", Hub("openai/gsm8k", "train", "main"), True),
    "math_train": Benchmark("math_train.jsonl", Hub("DigitalLearningGmbH/MATH-lighteval", "train"), True),
    "humaneval": Benchmark("humaneval.jsonl", Hub("openai/openai_humaneval", "test")),
    "mbpp": Benchmark("mbpp.jsonl", Hub("google-research-datasets/mbpp", "test", "full")),
    "olympiadbench": Benchmark(
        "olympiadbench.jsonl", Hub("Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP")
    ),
    "minerva_math": Benchmark("minerva_math.jsonl", Hub("math-ai/minervamath", "test")),
}


def problems(
    source: str,
    *,
    count: int | None = None,
    split: Split = "heldout",
    seed: int = 0,
    data_dir: Path | None = None,
) -> list[Problem]:
    """The problems of a source, in its own order.

    Args:
        count: at most this many, from the start; `None` = all, or `GENERATED` of a generator.
        split: of a generator, and of files whose rows name theirs (MBPP: `test` or `train`).
        seed: of a generator; the others do not depend on it.
        data_dir: folder of the benchmarks' files; `None` = $R1_DATA.

    Raises:
        UserError: the source is unknown, cannot be read or is empty, or a line of it is no problem.
    """
    source = ALIASES.get(source, source)
    kind, _, rest = source.partition(":")
    if count is not None and count < 1:
        raise UserError(f"{source}: count {count} must be at least 1")
    if kind == "generator":
        return generate(rest, count or GENERATED, split, seed)
    folder, public = data_folder(data_dir), True
    if kind == "hub":
        hub = parse_hub(source)
        stem, rows = hub.path, hub_rows(hub)
    elif source in BENCHMARKS:
        stem, rows, public = benchmark_rows(source, folder, split)
    elif source.endswith((".jsonl", ".json")) or Path(source).is_file():
        path = next((p for p in (Path(source), (folder or Path()) / source) if p.is_file()), None)
        if path is None:
            raise UserError(f"no file {source}{f', nor in {folder}' if folder else ''}")
        stem, rows, public = path.stem, located(path), False
    else:
        raise UserError(
            f"unknown problem set {source!r}; take a FILE.jsonl, generator:tiny, hub:OWNER/NAME:SPLIT "
            f"or one of: {', '.join([*ALIASES, *BENCHMARKS])}"
        )
    found = [problem for problem, _ in read_problems(rows, stem, public)]
    if not found:
        raise UserError(f"{source} holds no problem; expected one JSON object a line")
    return found[:count]


def read_problems(rows: Iterable[Located], stem: str, public: bool) -> Iterator[tuple[Problem, JsonObject]]:
    """Each problem with its row. Rows of a `public` data set, which its user cannot correct, may lack an
    answer: they are left out and counted on the console.

    Raises:
        UserError: a row of a file is no problem, or no row of a public data set is one.
    """
    bad: list[UserError] = []
    total = 0
    for i, (where, row) in enumerate(rows):
        total += 1
        try:
            yield to_problem(row, where, stem, i), row
        except UserError as error:
            bad.append(error)
            if not public:
                raise
    if bad and len(bad) == total:
        raise bad[0]
    if bad:
        print(f"{stem}: left out {len(bad)} of {total} rows; the first: {bad[0]}")


def data_folder(chosen: Path | None) -> Path | None:
    """Where the benchmarks' files lie: the folder that was chosen, else $R1_DATA, else nowhere."""
    return chosen or (Path(os.environ["R1_DATA"]) if os.environ.get("R1_DATA") else None)


def benchmark_rows(
    name: str, folder: Path | None, split: Split = "heldout"
) -> tuple[str, Iterator[Located], bool]:
    """Name and located rows of a benchmark: of its local file, or else of its hub data set, and True then."""
    bench = BENCHMARKS[name]
    row_split = ("train" if split == "train" else "test") if name == "mbpp" else None
    for file in (folder / bench.file, folder / f"{name}.jsonl") if folder else ():
        if file.is_file():
            rows = ((at, row) for at, row in located(file) if row.get("split", row_split) == row_split)
            return file.stem, rows if row_split else located(file), False
    hub = replace(bench.hub, split=row_split or bench.hub.split)
    try:
        return name, hub_rows(hub), True
    except UserError as error:
        missing = f"{folder} has no {bench.file}" if folder else f"no data folder is set for {bench.file}"
        raise UserError(
            f"{name}: {missing}, and {error}; put {bench.file} in a folder and pass --data FOLDER (or set "
            f"R1_DATA), or go online so that the hub data set {hub.path} can be downloaded"
        ) from error


def pooled(sources: Sequence[str], *, count: int, seed: int, data_dir: Path | None) -> list[Problem]:
    """Training `problems` of several sources, one after the other."""
    load = partial(problems, count=count, split="train", seed=seed, data_dir=data_dir)
    return [p for source in sources for p in load(source)]


def order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of `n` items in an epoch. Nothing else decides it: a resumed run needs only its index."""
    items = list(range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(items)
    return items
