"""What a stage trains on: problems, some of their tests held back and long ones left out, and their order; or
worked rows."""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.corpus import Row
from pipeline.data.decontaminate import Questions
from pipeline.data.jsonl import BadRow
from pipeline.data.problems import data_folder, order, problems
from pipeline.data.rows import Tally
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.metrics import say
from pipeline.settings.common import HeldoutSettings, RowSettings
from pipeline.settings.rollouts import GeneratingSettings
from rollout.checkpoint import context_of
from rollout.collect import has_spread
from rollout.text.tokenizer import encode_example, encode_prompt
from rollout.types import Graded, Problem

GENERATED = "generator:"
"""In the source of problems that are held out by construction (`pipeline.data.generators`)."""


class HasQuestion(Protocol):
    """A problem or a row of a corpus."""

    @property
    def question(self) -> str: ...
    @property
    def source(self) -> str: ...


T = TypeVar("T", bound=HasQuestion)


def apart(items: Iterable[T], config: HeldoutSettings, run_dir: RunDir) -> Iterator[T]:
    """`items` less what holds a problem of the benchmarks `config.heldout`. Generated ones pass, and a
    benchmark is only read where there are others. What was left out, and which benchmarks could not be read,
    is said on the console and noted in env.json. Raises `UserError`: nothing is left."""
    questions, told, total, kept = None, "", 0, 0
    for item in items:
        if config.heldout and GENERATED not in item.source:
            if questions is None:
                questions, told = read_benchmarks(config.heldout, data_folder(config.data))
            total += 1
            if any(questions.held_by(item.question)):
                continue
            kept += 1
        yield item
    if total:
        told = f"{total - kept} of {total} problems hold one of {told}"
        if not kept:
            raise UserError(f"all {told}: take others, or --heldout")
        say(f"{run_dir.stage.name}: left out: {told}")
        run_dir.note("decontamination", told)


def read_benchmarks(names: Sequence[str], folder: Path | None) -> tuple[Questions, str]:
    """The problems of the benchmarks, and which those are; also those that cannot be read, and why."""
    found, unread = list[str](), dict[str, str]()
    for name in names:
        try:
            found += [problem.question for problem in problems(name, data_dir=folder)]
        except UserError as error:
            unread[name] = f"; not compared with {name} ({str(error).removeprefix(f'{name}: ')[:60]})"
    read = ", ".join(name for name in names if name not in unread) or "no benchmark"
    return Questions(found), read + "".join(unread.values())


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


class Order:
    """The endless order of problems: each once an epoch, shuffled by seed and epoch, or as they come.

    A problem whose last group had no spread, because it is always or never solved, would teach nothing now.
    It is `settled`, and in the share `again` of the later epochs alone. An epoch's order is fixed as it
    begins, so that nothing is known of past ones but where `again` is 1."""

    def __init__(self, ids: Sequence[str], seed: int, *, shuffled: bool = True, again: float = 1.0) -> None:
        self.ids, self.seed, self.shuffled, self.again = ids, seed, shuffled, again
        self.settled = set[str]()
        self.epoch = self.start = 0  # this epoch's number, and the place of its first problem
        self.now = self.begin()

    def begin(self) -> list[int]:
        """Indices of the problems of the epoch that begins."""
        every = order(len(self.ids), self.seed, self.epoch) if self.shuffled else list(range(len(self.ids)))
        if self.again == 1.0:
            return every
        chance = random.Random(f"again/{self.seed}/{self.epoch}").random
        luck = [chance() < self.again for _ in every]
        return [i for i in every if luck[i] or self.ids[i] not in self.settled] or every

    def at(self, place: int) -> int:
        """Index of the problem at `place` of the endless order."""
        if place < self.start:
            self.epoch = self.start = 0
            self.now = self.begin()
        while place >= self.start + len(self.now):
            self.start, self.epoch = self.start + len(self.now), self.epoch + 1
            self.now = self.begin()
        return self.now[place - self.start]

    def saw(self, graded: Sequence[Graded]) -> None:
        """Note which problems of these rollouts have groups without spread; those that only failed stay."""
        groups = defaultdict[str, list[Graded]](list)
        for each in graded:
            if each.verdict != "error":
                groups[each.rollout.prompt.problem.id].append(each)
        for name, group in groups.items():
            (self.settled.discard if has_spread(group) else self.settled.add)(name)

    def state_dict(self) -> dict[str, Any]:
        """What `at` depends on."""
        return {"settled": sorted(self.settled), "epoch": self.epoch, "start": self.start, "now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.settled = set(state["settled"])
        self.epoch, self.start, self.now = state["epoch"], state["start"], state["now"]


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
