"""Scores of parts of a benchmark: by subject and level, and without what the training corpus has of it."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from pipeline.data.corpus import asked_in
from pipeline.data.decontaminate import copied
from pipeline.data.jsonl import JsonObject
from pipeline.data.problems import data_folder, source_rows
from pipeline.data.rows import Tally, plain
from pipeline.errors import UserError
from pipeline.evaluation.intervals import interval
from pipeline.evaluation.scores import families_of
from pipeline.settings.evaluate import EvaluateSettings
from rollout.types import Problem


def accuracy(rows: Sequence[JsonObject]) -> JsonObject | None:
    """`pass@1` of these rows, number of questions `n`, and 95 % interval; None of none."""
    groups = defaultdict[int, list[JsonObject]](list)
    for row in rows:
        groups[row["index"]].append(row)
    means = [sum(row["verdict"] == "correct" for row in of) / len(of) for of in groups.values()]
    if not means:
        return None
    families = families_of([of[0] for of in groups.values()])
    bounds, _ = interval(means, len(rows) // len(means), families)
    return {"pass@1": sum(means) / len(means), "n": len(means), "interval": list(bounds)}


def by_label(rows: Sequence[JsonObject]) -> JsonObject:
    """`by_subject` and `by_level`: `accuracy` by the label's value, where questions have one."""
    found: JsonObject = {}
    for label in ("subject", "level"):
        parts = defaultdict[str, list[JsonObject]](list)
        for row in rows:
            if value := row["labels"].get(label):
                parts[value].append(row)
        if parts:
            order = sorted(parts, key=lambda value: (value.isdigit() * len(value), value))  # "2" before "10"
            found[f"by_{label}"] = {value: accuracy(parts[value]) for value in order}
    return found


def copies_in(config: EvaluateSettings, found: Sequence[Problem]) -> JsonObject:
    """Which of the questions `config.corpus` has `copies` of, word by word, and which `near_copies`, such as
    the same question with other numbers, by index; {} without a corpus.
    Raises `UserError`: one that cannot be read, has no rows, or too many without a question."""
    rows, digest, folder = 0, hashlib.sha256(), data_folder(config.data)

    def questions() -> Iterator[str]:
        nonlocal rows
        for source in config.corpus:
            name, lines = source_rows(source, folder)
            tally = Tally(name, config)
            for _, question in tally.usable(lines, lambda row, _: asked_in(plain(row, {}), Counter())[0]):
                digest.update(question.encode(errors="backslashreplace") + b"\0")
                yield question
            tally.settle()
            rows += tally.total
            if not tally.total:
                raise UserError(f"{source} has no rows; name what the model was trained on as --corpus")

    copies, near = copied([problem.question for problem in found], questions())
    told = {"corpus": list(config.corpus), "corpus_rows": rows, "corpus_sha256": digest.hexdigest()}
    return {**told, "copies": sorted(copies), "near_copies": sorted(near - copies)} if config.corpus else {}


def notes_of(scores: JsonObject) -> JsonObject:
    """What `copies_in` found for these scores."""
    noted = scores.get("contamination")
    return {k: v for k, v in noted.items() if k != "without_copies"} if isinstance(noted, dict) else {}


def contamination(rows: Sequence[JsonObject], copies: JsonObject) -> JsonObject:
    """What `copies_in` found and the accuracy `without_copies` of either kind, None where all are; {} without
    a corpus."""
    known = {*copies.get("copies", ()), *copies.get("near_copies", ())}
    others = [row for row in rows if row["index"] not in known]
    return {"contamination": {**copies, "without_copies": accuracy(others)}} if copies else {}
