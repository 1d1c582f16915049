"""What a stage trains on: problems, some of their tests held back and long ones left out, or worked rows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.corpus import Row
from pipeline.data.decontaminate import apart
from pipeline.data.jsonl import BadRow
from pipeline.data.problems import problems
from pipeline.data.rows import Tally
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.settings.common import RowSettings
from pipeline.settings.rollouts import GeneratingSettings
from rollout.checkpoint import context_of
from rollout.text.tokenizer import encode_example, encode_prompt
from rollout.types import Problem


def pooled(
    config: GeneratingSettings, tokenizer: Tokenizer, model: Path | None, seed: int, run_dir: RunDir
) -> list[Problem]:
    """Training problems of all sources, one after the other, for the model directory `model`, if any; their
    hash is recorded. Raises `UserError`: a source cannot be read, or none of its problems is left or fits the
    model's context."""
    data, most = config.data, config.pool
    load = partial(problems, count=most, split="train", seed=seed, data_dir=data, rows=config)
    found = apart([problem for source in config.problems for problem in load(source)], config, run_dir)
    kept = fitting([hold_back(problem, config.hold_back) for problem in found], config, tokenizer, model)
    run_dir.record_rows(f"the problems of {', '.join(config.problems)}", kept)
    return kept


def hold_back(problem: Problem, share: float) -> Problem:
    """The problem with only the first of the asserts at its question's end (MBPP): `share` of them, but never
    all, are left out of the question. All are graded."""
    shown, question = problem.shown, problem.question
    tails = ["\n" + "\n".join(map(str, problem.tests[at:shown])) for at in range(shown)]
    listed = sum(map(question.endswith, tails))
    hidden = min(math.ceil(share * listed), listed - 1)
    if hidden < 1:
        return problem
    return replace(problem, question=question.removesuffix(tails[-hidden]), shown=shown - hidden)


def fitting(
    found: Sequence[Problem], config: GeneratingSettings, tokenizer: Tokenizer, model: Path | None
) -> list[Problem]:
    """The problems whose prompt and `max_tokens` the context holds; others are counted on the console.
    Raises `UserError`: none is left, or the model's chat template cannot be used."""
    try:
        sizes = [len(encode_prompt(tokenizer, problem.question, config.template)) for problem in found]
    except ValueError as error:
        raise UserError(f"{model}: {error}") from error
    known = (context_of(model), config.rollout.vllm.context) if model else ()
    most = min(filter(None, known), default=0)
    if not most:
        return list(found)
    kept = [p for p, size in zip(found, sizes, strict=True) if size + config.max_tokens <= most]
    limit = f"with max_tokens={config.max_tokens} exceed the model's context of {most} tokens"
    if not kept:
        room = most - min(sizes)
        where = ", ".join(sorted({problem.source or "the list" for problem in found}))
        way = f"set --max-tokens to at most {room}" if room > 0 else "take shorter problems"
        raise UserError(f"all {len(found)} problems of {where} {limit}; {way}")
    if len(kept) < len(found):
        print(f"{len(found) - len(kept)} of {len(found)} problems {limit}: left out")
    return kept


def encoded(
    rows: Iterable[Row], tokenizer: Tokenizer, template: str, settings: RowSettings, vocabulary: int
) -> Iterator[tuple[Row, list[int], list[int]]]:
    """Each row that the template and the model's `vocabulary` fit, with its prompt and completion ids; others
    are left out and counted. Raises `UserError`: they are more than `settings` allows."""

    def ids(row: Row, _: int) -> tuple[Row, list[int], list[int]]:
        try:
            prompt, completion = encode_example(tokenizer, row.question, template, row.completion)
        except ValueError as error:
            raise BadRow(f"does not fit template {template}: {error}") from error
        if max(prompt + completion) >= vocabulary:
            agree = "take a checkpoint whose tokenizer and weights agree"
            raise BadRow(f"has token ids beyond the model's vocabulary of {vocabulary}; {agree}")
        return row, prompt, completion

    tally = Tally("the corpus", settings)
    yield from (found for _, found in tally.usable(((f"the row {row.id!r}", row) for row in rows), ids))
    tally.settle()
