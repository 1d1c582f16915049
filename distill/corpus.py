"""What students learn: worked traces, and the same questions answered without reasoning.

The rows are `pipeline.data.corpus`'s: `completion` is the full text to learn, tags included. Traces
come from the `reject` stage (the teacher's kept samples) or, here, from the published solutions of GSM8K
and MATH. `plain_rows` makes the control that shows what the traces teach.

A corpus may be larger than memory: its rows go one at a time to Arrow files in the run directory, as text and
as each student's token ids, and training reads those files where they lie.

    rows/corpus.arrow           the rows of all sources
    rows/{student,plain}.arrow  input_ids, labels (the prompt's are IGNORE), question (a hash of its words)

Paper  distillation from the teacher's kept samples    arXiv:2501.12948  Sec. 2.4
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from distill.batches import IGNORE
from pipeline.data.corpus import Row, corpus_rows, tagged
from pipeline.data.pool import apart, encoded
from pipeline.data.problems import data_folder
from pipeline.data.solutions import read_solutions, worked_steps
from pipeline.errors import UserError
from pipeline.run import ranks
from pipeline.run.directory import RunDir
from pipeline.run.files import replacing
from pipeline.run.metrics import say
from pipeline.settings.distill import DistillSettings
from pipeline.train.policy import loading
from rewards.maths.extract import last_boxed, outside_think
from rollout.checkpoint import context_and_vocabulary
from rollout.text.templates import template_named
from rollout.types import Problem

WORKED = ("gsm8k_train", "math_train")
"""Sources with published solutions."""
TEXTS = Features({field.name: Value("large_string") for field in fields(Row)})
IDS = Features(
    {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "question": Value("int64")}
)


def traces(config: DistillSettings, run_dir: RunDir) -> Iterator[Row]:
    """The rows of every source of the corpus, one after the other, that hold no problem of a benchmark."""
    yield from apart(every_row(config, run_dir), config, run_dir)


def every_row(config: DistillSettings, run_dir: RunDir) -> Iterator[Row]:
    """The rows of every source."""
    for source in config.corpus:
        worked = source in WORKED
        found = solutions(config, source) if worked else corpus_rows(run_dir.corpus_input(source), config)
        count = 0
        for row in found:
            count += 1
            yield row
        say(f"distill: {count} traces from {source}")


def stored(run_dir: RunDir, name: str, rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """`rows` in the Arrow file `rows/NAME.arrow`, mapped into memory, its hash recorded. They are written
    once, by rank 0; the file appears complete or not at all."""
    path = run_dir.path / "rows" / f"{name}.arrow"
    if not ranks.rank() and not path.is_file():
        path.parent.mkdir(exist_ok=True)
        with (
            replacing(path) as partial,
            ArrowWriter(None, features, path=str(partial), writer_batch_size=100) as writer,
        ):
            for row in rows:
                writer.write(row)
            writer.finalize()
    ranks.wait()
    run_dir.record_input(path)
    return Dataset.from_file(str(path))


def texts(config: DistillSettings, run_dir: RunDir) -> Dataset:
    """All rows, or `count` of them sampled by the seed."""
    rows = stored(run_dir, "corpus", map(asdict, traces(config, run_dir)), TEXTS)
    if 0 < config.count < len(rows):
        rng = random.Random(f"distill/{config.seed}")
        rows = rows.select(rng.sample(range(len(rows)), config.count))
    return rows


def tokenized(
    label: str, template: str, rows: Iterable[Row], tokenizer: Any, config: DistillSettings, init: Path
) -> Iterator[dict[str, Any]]:
    """Rows as token ids; those too long for the settings or for the model at `init` are dropped and counted.
    The lengths go to the console."""
    with loading(init):
        most, vocabulary = context_and_vocabulary(init, config.max_length)
    longest, every, sizes = config.max_completion or most, 0, list[int]()
    for row, prompt, completion in encoded(rows, tokenizer, template, config, vocabulary):
        size, every = len(prompt) + len(completion), every + 1
        if size <= most and len(completion) <= longest:
            sizes.append(size)
            words = f"{config.seed} {' '.join(row.question.lower().split())}"
            key = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7])
            labels = [IGNORE] * len(prompt) + completion
            yield {"input_ids": prompt + completion, "labels": labels, "question": key}
    if not sizes:
        where, limit = ", ".join(config.corpus), f"max_length={config.max_length}; raise it"
        limit = limit if most == config.max_length else f"the model's context of {most} tokens"
        raise UserError(f"none of {every} rows of {where} fits {limit}")
    dropped = f"; dropped {every - len(sizes)} too long ones" if len(sizes) < every else ""
    middle, most = np.quantile(sizes, [0.5, 0.9])
    spread = f"mean {np.mean(sizes):.0f}, median {middle:.0f}, 90 % at most {most:.0f}, longest {max(sizes)}"
    say(f"distill: {label}: {len(sizes)} rows; tokens: {spread}{dropped}")


def plain_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """The same questions, answered without reasoning. What stands outside the think block is kept as it is
    (`<answer>7</answer>`); a worked solution without tags shrinks to its box. Others are left out."""
    for row in rows:
        answer = row.answer or last_boxed(row.completion)
        completion = f"\\boxed{{{answer}}}" if answer else ""
        if "</think>" in row.completion:
            completion = outside_think(row.completion).strip()
        if completion:
            yield replace(row, completion=completion)


def solutions(config: DistillSettings, source: str) -> Iterator[Row]:
    """GSM8K's or MATH's training solutions as traces in the form that the template asks for."""
    solved = read_solutions(source, data_folder(config.data), config)
    return worked_rows(solved, tags=template_named(config.template).think == "open")


def worked_rows(solved: Iterable[tuple[Problem, str]], *, tags: bool) -> Iterator[Row]:
    """Published solutions as traces that end in the boxed answer; what has no solution is left out. `tags`
    puts them in R1's format; without, for templates that ask for a box, the solution is as it stands."""
    for problem, solution in solved:
        steps = worked_steps(solution, problem.answer)
        if steps and problem.answer:
            p, text = problem, tagged(steps, f"\\boxed{{{problem.answer}}}") if tags else steps
            yield Row(p.id, p.question.strip(), text, p.answer, p.language, p.kind, p.source)
