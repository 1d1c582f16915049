"""Problem sets: generators, local JSONL files, benchmarks by name, any hub data set.

    generator:TASK             pipeline.data.generators; endless, split by construction
    FILE.jsonl                 one problem a line: question|problem|prompt, answer|solution or tests
    math500, aime24, ...       a name in `BENCHMARKS`: its file in --data DIR or $R1_DATA, else the hub's
    hub:OWNER/NAME[:CONFIG]:SPLIT   any data set with such keys
    heldout                    the tiny preset's own held-out set, generator:tiny

No data travels with the code. A source that cannot be read is a `UserError` that says how to get it.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from pipeline.data.generators import generate
from pipeline.errors import UserError
from rewards.maths.extract import last_boxed
from rollout.types import Kind, Language, Problem, StdioTest

Split = Literal["train", "heldout"]
Row = Mapping[str, Any]

ALIASES = {"heldout": "generator:tiny"}
GENERATED = 320
"""Problems of a generator when no count is given: a standard error below 2.8 points."""
NGRAM = 10
"""Words of the n-grams by which near copies are found."""


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the hub keeps a data set."""

    path: str
    config: str | None
    split: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A public problem set."""

    file: str
    """Its name as a local file."""
    hub: Hub
    train: bool = False
    """A training set: no benchmark at all, but read in the same way."""


BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark("math500.jsonl", Hub("HuggingFaceH4/MATH-500", None, "test")),
    "aime24": Benchmark("aime24.jsonl", Hub("HuggingFaceH4/aime_2024", None, "train")),
    "aime25": Benchmark("aime25.jsonl", Hub("math-ai/aime25", None, "test")),
    "amc23": Benchmark("amc23.jsonl", Hub("math-ai/amc23", None, "test")),
    "gsm8k": Benchmark("gsm8k_test.jsonl", Hub("openai/gsm8k", "main", "test")),
    "gsm8k_train": Benchmark("gsm8k_train.jsonl", Hub("openai/gsm8k", "main", "train"), train=True),
    "math_train": Benchmark(
        "math_train.jsonl", Hub("DigitalLearningGmbH/MATH-lighteval", None, "train"), train=True
    ),
    "humaneval": Benchmark("humaneval.jsonl", Hub("openai/openai_humaneval", None, "test")),
    "mbpp": Benchmark("mbpp.jsonl", Hub("google-research-datasets/mbpp", "full", "test")),
    "olympiadbench": Benchmark(
        "olympiadbench.jsonl", Hub("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")
    ),
    "minerva_math": Benchmark("minerva_math.jsonl", Hub("math-ai/minervamath", None, "test")),
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
        source: see the module.
        count: the first so many; `None` = all, or `GENERATED` of a generator.
        split: of a generator, and of files whose rows name theirs (MBPP: `test` or `train`).
        seed: of a generator; the others are as they are.
        data_dir: folder of the benchmarks' files; `None` = $R1_DATA.

    Raises:
        UserError: the source is unknown or cannot be read, or a line of it is no problem.
    """
    source = ALIASES.get(source, source)
    kind, _, rest = source.partition(":")
    if count is not None and count < 1:
        raise UserError(f"{source}: count {count} must be at least 1")
    if kind == "generator":
        try:
            return generate(rest, count or GENERATED, split, seed)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    folder = data_folder(data_dir)
    if kind == "hub":
        found = from_hub(parse_hub(source), source)
    elif source in BENCHMARKS:
        found = from_benchmark(source, folder, split)
    elif source.endswith((".jsonl", ".json")) or Path(source).is_file():
        found = from_file(find_file(source, folder))
    else:
        raise UserError(
            f"unknown problem set {source!r}; take a FILE.jsonl, generator:tiny, hub:OWNER/NAME:SPLIT "
            f"or one of: {', '.join([*ALIASES, *BENCHMARKS])}"
        )
    return found[:count]


# ---- sources


def data_folder(chosen: Path | None) -> Path | None:
    """Where the benchmarks' files lie: the folder that was chosen, else $R1_DATA, else nowhere."""
    return chosen or (Path(os.environ["R1_DATA"]) if os.environ.get("R1_DATA") else None)


def find_file(source: str, folder: Path | None) -> Path:
    """`source` as a path, or inside the data folder."""
    for path in (Path(source), folder / source if folder else Path(source)):
        if path.is_file():
            return path
    raise UserError(f"no file {source}{f', nor in {folder}' if folder else ''}")


def from_file(path: Path, row_split: str | None = None) -> list[Problem]:
    """The problems of a JSONL file; with `row_split` only of the rows that name that split.

    Raises:
        UserError: with file and line, for a line that is no JSON object or lacks a key; for an empty file.
    """
    found: list[Problem] = []
    lines = 0
    for number, row in read_rows(path):
        lines += 1
        if row_split is None or row.get("split", row_split) == row_split:
            found.append(to_problem(row, f"{path}:{number}", path.stem, len(found)))
    if not found:
        what = f"no row of split {row_split!r}" if lines else "no problem (it is empty)"
        raise UserError(f"{path} holds {what}; one JSON object a line is wanted")
    return found


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers, from 1, and objects of a JSONL file; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else None
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from error
            if row is None and not text:
                continue
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a JSON object is wanted, not {type(row).__name__}")
            yield number, row


def from_benchmark(name: str, folder: Path | None, split: Split) -> list[Problem]:
    """A benchmark's local file, or else its hub data set."""
    bench = BENCHMARKS[name]
    row_split = {"heldout": "test", "train": "train"}[split] if name == "mbpp" else None
    if folder is not None:
        for file in (folder / bench.file, folder / f"{name}.jsonl"):
            if file.is_file():
                return from_file(file, row_split)
    hub = bench.hub if row_split is None else Hub(bench.hub.path, bench.hub.config, row_split)
    try:
        return from_hub(hub, name)
    except UserError as error:
        missing = f"{folder} has no {bench.file}" if folder else f"no data folder is set for {bench.file}"
        raise UserError(
            f"{name}: {missing}, and {error}; put {bench.file} in a folder and pass --data FOLDER (or set "
            f"R1_DATA), or get on line so that the hub data set {hub.path} can be downloaded"
        ) from error


def parse_hub(source: str) -> Hub:
    """`hub:OWNER/NAME[:CONFIG]:SPLIT`."""
    parts = source.split(":")[1:]
    if len(parts) == 2:
        return Hub(parts[0], None, parts[1])
    if len(parts) == 3:
        return Hub(*parts)
    raise UserError(f"{source}: the form is hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT")


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached, directly or by a proxy; asked once, and briefly."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), 5).close()
    except OSError:
        return False
    return True


def from_hub(hub: Hub, source: str) -> list[Problem]:
    """The problems of a hub data set, downloaded or from its cache."""
    import datasets  # takes seconds to import, and most sources do not need it
    from huggingface_hub import constants

    if not hub_answers():  # read the cache, and do not retry for half a minute a data set
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # the hub client raises a dozen unrelated types, offline and on line
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(
            f"the hub data set {hub.path} cannot be read ({type(error).__name__}: {reason})"
        ) from error
    stem = source if source in BENCHMARKS else hub.path
    where = f"{hub.path} ({hub.split})"
    found = [to_problem(row, f"{where} row {i}", stem, i) for i, row in enumerate(rows)]
    if not found:
        raise UserError(f"{where} is empty")
    return found


# ---- rows to problems


def first(row: Row, *keys: str) -> Any:
    """The value of the first key that the row has and fills."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)


def to_problem(row: Row, where: str, source: str, index: int) -> Problem:
    """A row of any of the known shapes as a problem.

    Args:
        row: JSON object.
        where: file and line, for errors.
        source: what the problem's `source` and id fall back to.
        index: the row's place, for its id.

    Raises:
        UserError: no question, or neither answer nor tests.
    """
    question = first(row, "question", "problem", "prompt", "text")
    if not isinstance(question, str):
        raise UserError(f"{where}: no question; a key question, problem or prompt with text is wanted")
    name = first(row, "id", "unique_id", "task_id", "ID")
    identity = str(name) if isinstance(name, str) else f"{source}/{index if name is None else name}"
    tests = code_tests(row, where)
    answer = "" if tests else gold_answer(row, where)
    kind = choice(row, "kind", ("math", "general", "code"), where) or "math"
    return Problem(
        id=identity,
        kind="code" if tests else cast(Kind, kind),
        question=code_question(row, question) if tests else question,
        answer=answer,
        tests=tests,
        source=str(row.get("source") or source),
        language=cast(Language, choice(row, "language", ("en", "zh"), where) or "en"),
    )


def choice(row: Row, key: str, allowed: tuple[str, ...], where: str) -> str | None:
    """The row's value of an optional key that has few values."""
    value = row.get(key)
    if value is not None and value not in allowed:
        raise UserError(f"{where}: {key} {value!r} must be one of {', '.join(allowed)}")
    return cast("str | None", value)


def code_tests(row: Row, where: str) -> tuple[str | StdioTest, ...]:
    """Tests of a code problem: HumanEval, MBPP, stdin/stdout cases, or our own statements; else none."""
    if "entry_point" in row and isinstance(row.get("test"), str):  # HumanEval: one statement that checks all
        return (f"{row['test']}\ncheck({row['entry_point']})",)
    if row.get("test_list"):  # MBPP
        setup = row.get("test_setup_code") or ""
        return (*([setup] if setup.strip() else []), *map(str, row["test_list"]))
    tests = row.get("tests")
    if not tests:
        if row.get("kind") == "code":
            raise UserError(f"{where}: a code problem without tests")
        return ()
    if not isinstance(tests, list):
        raise UserError(f"{where}: tests must be a list, not {type(tests).__name__}")
    found: list[str | StdioTest] = []
    for test in tests:
        if isinstance(test, str):
            found.append(test)
        elif isinstance(test, dict) and {"input", "output"} <= test.keys():
            found.append(StdioTest(str(test["input"]), str(test["output"])))
        else:
            raise UserError(f"{where}: a test is a Python statement or an object with input and output")
    return tuple(found)


def code_question(row: Row, question: str) -> str:
    """The task as it is put to the model: what to write; for MBPP the tests, which name the function."""
    if "entry_point" in row and isinstance(row.get("test"), str):
        return (
            "Complete this Python function. Answer with the whole function and its imports in one "
            f"```python block.\n\n```python\n{question.rstrip()}\n```"
        )
    if row.get("test_list"):
        tests = "\n".join(map(str, row["test_list"]))
        return f"{question}\n\nAnswer with one ```python block. It should pass these tests:\n\n{tests}"
    if isinstance(first(row, "tests"), list) and isinstance(row["tests"][0], dict):
        return f"{question}\n\nAnswer with one ```python block: a program that reads stdin and writes stdout."
    return question


def gold_answer(row: Row, where: str) -> str:
    """The row's answer as text: after GSM8K's `####`, or boxed in a solution where there is none."""
    value = first(row, "answer", "final_answer")
    if isinstance(value, list):  # OlympiadBench
        value = ", ".join(map(str, value))
    if value is not None:
        text = str(value).strip()
        return text.rpartition("####")[2].strip().replace(",", "") if "\n####" in text else text
    solution = first(row, "solution", "response")
    if isinstance(solution, str):
        found = last_boxed(solution)
        if found is None and "####" in solution:
            found = solution.rpartition("####")[2].strip().replace(",", "")
        if found:
            return found
    raise UserError(f"{where}: no answer; a key answer, a solution that boxes one, or tests are wanted")


# ---- what to train on, and in which order

# Spacing, maths delimiters and sentence marks; signs, operators and decimal points make another problem.
_LOOSE = re.compile(r"\\[,;: ]|\\(?:left|right)\b|[\s${}\"'“”‘’,;:?。，？：；]|\.(?!\d)")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def normalised(text: str) -> str:
    """Text without case, spacing, `$`, braces and sentence marks."""
    return _LOOSE.sub("", text.casefold())


def ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """The different word 10-grams of a text, lower case; a Han character is a word."""
    words = _WORD.findall(text.lower())
    return frozenset(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def decontaminate(train: Iterable[Problem], heldout: Iterable[Problem]) -> list[Problem]:
    """The training problems that are no copy, or near copy, of an evaluation problem.

    Dropped is a problem with the same normalised text as an evaluation problem, and one that has half or
    more of its own word 10-grams in common with a single one (the same problem with other numbers).
    """
    exact: set[str] = set()
    holders: dict[tuple[str, ...], list[int]] = {}
    for index, problem in enumerate(heldout):
        exact.add(normalised(problem.question))
        for gram in ngrams(problem.question):
            holders.setdefault(gram, []).append(index)

    def is_copy(problem: Problem) -> bool:
        if normalised(problem.question) in exact:
            return True
        grams = ngrams(problem.question)
        shared: dict[int, int] = {}
        for gram in grams:
            for index in holders.get(gram, ()):
                shared[index] = shared.get(index, 0) + 1
        return bool(grams) and 2 * max(shared.values(), default=0) >= len(grams)

    return [problem for problem in train if not is_copy(problem)]


def order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of `n` items in an epoch. Nothing else decides it: a resumed run needs only its place."""
    items = list(range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(items)
    return items
