"""`python -m pipeline evaluate`: one model on one benchmark.

Samples k completions a problem and grades them leniently (the answer counts, not the tags), part by part,
into a folder that grows meanwhile and can always go on (`pipeline.evaluation.folder`). The questions of a
part are generated together, and are the same whatever was killed before and however many workers there are:
so their bits are the same too.

Defaults: arXiv:2501.12948, Sec. 3: temperature 0.6, top-p 0.95, 32,768 tokens; `pipeline.evaluation.prompts`.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.jsonl import JsonObject
from pipeline.data.problems import problems
from pipeline.environments import open_environment
from pipeline.evaluation.folder import Folder
from pipeline.evaluation.generations import read_generations, row_of
from pipeline.evaluation.parts import copies_in, notes_of
from pipeline.evaluation.prompts import make_prompts, samples_of, worked_shots
from pipeline.evaluation.saved import read_rows
from pipeline.run.environment import environment
from pipeline.run.files import sha256
from pipeline.run.verifiers import check_errors, check_sandbox
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.tools.open import check_model, naming, open_speaker
from pipeline.train.place import device_named
from rewards.reward import Scorer
from rollout.checkpoint import context_of, eos_ids
from rollout.endpoint.engine import address
from rollout.engine import RolloutEngine
from rollout.text.templates import next_question
from rollout.text.tokenizer import Shots, completion_text, template_hash, turn_texts
from rollout.turns.engine import TurnEngine
from rollout.types import Graded, Problem, Prompt, Rollout

ROOM = 16
"""Tokens that a prompt must leave free in the model's context."""
CODE = ("model", "rollout", "rewards", "pipeline")
"""Packages that an evaluation runs."""


def evaluate(
    config: EvaluateSettings,
    model_hash: str | None = None,
    replace_changed: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> JsonObject:
    """Score a model on a benchmark, or go on with that, or read the scores that `config.out` already holds:
    scores.json's. Raises `UserError`: no such model, no such problems, or `config.out` holds something else.

    Args:
        model_hash: sha256 of the model directory, where the caller has it.
        replace_changed: scores with other inputs are replaced, once the new ones are complete.
        pause: called whenever a part is saved; what it raises ends the evaluation, to go on later.
    """
    check_model(config.model, config.engine)
    count, seed = config.limit, config.problems_seed
    found = problems(config.benchmark, count=count, seed=seed, data_dir=config.data, rows=config)
    config = replace(config, samples=samples_of(config, len(found)))
    shots, copies = worked_shots(config, found), copies_in(config, found)
    served = f"endpoint:{config.model}" if config.engine == "endpoint" else None
    inputs = inputs_of(config, found, shots, model_hash or served or sha256(config.model))
    folder = Folder(config.out, inputs, replace_changed)
    earlier = folder.earlier()
    if earlier and copies != notes_of(earlier):
        return folder.finish(read_rows(folder.rows, len(found), config.samples), copies)
    return earlier or complete(config, found, shots, folder, copies, pause)


def inputs_of(
    config: EvaluateSettings, found: Sequence[Problem], shots: Shots, model_hash: str
) -> JsonObject:
    """Whatever changes the completions; folders with equal inputs hold the same evaluation."""
    sampling = ("temperature", "top_p", "top_k", "max_tokens", "seed", "save_every")
    settings = ("engine", "samples", "template", "dtype", *sampling)
    told: JsonObject = {"shots": len(shots), "shots_sha256": digest(shots)} if shots else {}
    if config.environment:
        told |= {"environment": config.environment, "max_turns": config.max_turns}
    if config.engine == "vllm":
        own = ("quantization", "kv_dtype", "context", "seed_each")
        told["vllm"] = {name: getattr(config.vllm, name) for name in own}
    return {
        **{"benchmark": config.benchmark, "problems": len(found)},
        "problems_sha256": digest([asdict(problem) for problem in found]),
        **{"model": str(config.model), "model_sha256": model_hash},
        **{name: getattr(config, name) for name in settings},
        **told,
    }


def digest(value: object) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def made_with(config: EvaluateSettings) -> JsonObject:
    """What the bits may depend on beside the inputs: code, packages, machine, threads and batch."""
    env, root, seen = environment(), Path(__file__).parents[2], ("commit", "python", "packages", "machine")
    code = sorted((str(f.relative_to(root)), sha256(f)) for top in CODE for f in (root / top).rglob("*.py"))
    threads = config.threads or (1 if config.workers else torch.get_num_threads())
    own = {"device": str(device_named(config.device)), "threads": threads, "max_batch": config.max_batch}
    own |= {"address": address()} if config.engine == "endpoint" else {}
    return {"code_sha256": digest(code), **{name: env[name] for name in seen}, **own}


def complete(
    config: EvaluateSettings,
    found: list[Problem],
    shots: Shots,
    folder: Folder,
    copies: JsonObject,
    pause: Callable[[], None],
) -> JsonObject:
    """Sample and grade what is missing; the scores."""
    if batch := config.max_batch:
        vllm, local = replace(config.vllm, max_batch=batch), replace(config.local, max_batch=batch)
        endpoint = replace(config.endpoint, in_flight=min(batch, 1_024))
        config = replace(config, vllm=vllm, local=local, endpoint=endpoint)
    unsafe, tool = config.allow_unsafe_code, config.environment == "python"
    scorer = Scorer({"accuracy": 1.0}, mode="lenient", allow_unsafe_code=unsafe)
    check_sandbox("evaluate", scorer.pool, found, unsafe, tool)
    size = max(1, config.save_every // config.samples)
    whole = (config.workers or config.vllm.data_parallel > 1) and not config.environment
    window = len(found) if whole else size
    if config.engine == "endpoint":  # nothing shares a batch, so that only idle requests count
        size, window = 1, max(size, 4 * config.endpoint.in_flight // config.samples)
    engine, tokenizer = open_speaker(config, config.workers, task_prompts=size)
    with closing(engine), scorer:
        with naming(config.model):
            prompts = make_prompts(config, found, tokenizer, shots)
            shown = {p.template for p in prompts if p.problem.kind != "code"}
            names = sorted({p.template for p in prompts})
            templates = {n: template_hash(tokenizer, n, shots if n in shown else ()) for n in names}
            context = (config.engine != "endpoint" and context_of(config.model)) or sys.maxsize
            if config.environment:
                eos, most = eos_ids(config.model, tokenizer.eos_token_id), config.max_turns
                own = open_environment(config.environment, scorer.pool), tokenizer, eos, most
                engine = TurnEngine(engine, *own, context=context)
        parts = Parts(config, engine, tokenizer, scorer, prompts, size, window, context)
        with folder.growing(templates, made_with(config)):
            done = folder.resume([end * config.samples for end in parts.ends])
            times = f"{config.samples} sample{'s' * (config.samples > 1)} a problem"
            label = f"{config.benchmark}: {times}, {'+'.join(templates)}"
            print(f"evaluate {config.model}: {label}", file=sys.stderr, flush=True)
            sampled = watched(parts.sampled(done), label, folder.count, folder.total)
            with closing(sampled):
                for rows in parts.graded(sampled, done):
                    folder.append(rows)
                    pause()
            kept = read_generations(folder.rows, len(found), config.samples)
            check_errors(folder.path, [graded for _, graded in kept], config.max_error_share)
            return folder.finish([row for row, _ in kept], copies)


@dataclass(slots=True)
class Parts:
    """The questions of an evaluation, `size` of them in a part, not counting those that are too long."""

    config: EvaluateSettings
    engine: RolloutEngine
    tokenizer: Tokenizer
    scorer: Scorer
    prompts: Sequence[Prompt]
    size: int
    window: int  # questions of a request; of more than a part, workers have a part at a time
    context: int  # the model's, tokens

    @property
    def fits(self) -> list[int]:
        """Indices of the questions that leave room in the model's context: those that are sampled."""
        return [i for i, p in enumerate(self.prompts) if len(p.token_ids) <= self.context - ROOM]

    @property
    def ends(self) -> list[int]:
        """Index of the question after each part's last; one that is too long is of the part before it."""
        return [*self.fits[self.size :: self.size], len(self.prompts)]

    def sampled(self, part: int) -> Iterator[Rollout]:
        """The rollouts of all parts from `part` on; `index` counts the questions that fit."""
        config, sent = self.config, [self.prompts[i] for i in self.fits]
        limit = min(config.max_tokens, self.context - min((len(p.token_ids) for p in sent), default=0))
        params = config.params(n=config.samples, seed=config.seed, max_tokens=limit)
        marks = {next_question(p.template) for p in sent} if config.shots else set[str]()
        params = replace(params, stop=tuple(sorted(marks - {""})))
        for first in range(part * self.size, len(sent), self.window):
            with naming(config.model):
                own = replace(params, first_index=first)
                for rollout in self.engine.generate(sent[first : first + self.window], own):
                    yield replace(rollout, index=first + rollout.index)

    def graded(self, rollouts: Iterable[Rollout], part: int) -> Iterator[list[JsonObject]]:
        """The rows of each part from `part` on, in order, once its rollouts are complete.
        Raises `RuntimeError`: the engine lost a rollout, or returned one twice."""
        held, arriving = defaultdict[int, list[Rollout]](list), iter(rollouts)
        ends, fits, samples = [0, *self.ends], self.fits, self.config.samples
        for number in range(part, len(ends) - 1):
            due = range(number * self.size, min((number + 1) * self.size, len(fits)))
            while len(held[number]) < len(due) * samples and (rollout := next(arriving, None)):
                held[rollout.index // self.size].append(rollout)
            done = sorted(held.pop(number), key=lambda r: (r.index, r.sample))
            if [(r.index, r.sample) for r in done] != [(i, s) for i in due for s in range(samples)]:
                raise RuntimeError(f"the engine lost rollouts of questions {due.start} to {due.stop - 1}")
            graded = self.scorer.grade_all((r, self.text(r)) for r in done)
            by_name = {(fits[g.rollout.index], g.rollout.sample): g for g in graded}
            yield [
                self.row(index, sample, by_name.get((index, sample)))
                for index in range(ends[number], ends[number + 1])
                for sample in range(samples)
            ]

    def text(self, rollout: Rollout) -> str:
        """What is graded: up to the next question that a base model goes on to ask itself."""
        text, mark = completion_text(self.tokenizer, rollout, t := rollout.prompt.template), next_question(t)
        return text.partition(mark)[0] if self.config.shots and mark else text

    def row(self, index: int, sample: int, graded: Graded | None) -> JsonObject:
        """A row; None = the question is too long, so it is not right, and says so."""
        prompt = self.prompts[index]
        asked = str(self.tokenizer.decode(list(prompt.token_ids), clean_up_tokenization_spaces=False))
        if graded is not None:
            told = {"turns": turn_texts(self.tokenizer, graded.rollout)} if graded.rollout.observed else {}
            return row_of(index, graded, asked) | told
        detail = f"prompt longer than the context ({len(prompt.token_ids)} tokens)"
        nothing = Graded(Rollout(prompt, index, sample, (), (), "length"), "", detail=detail)
        return row_of(index, nothing, asked) | {"finish_reason": None}


def watched(rollouts: Iterable[Rollout], label: str, done: int, total: int) -> Generator[Rollout]:
    """The rollouts; meanwhile a line on stderr with the time left, but nothing where stderr is a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(rollouts, total, done, description=label)


def main(config: EvaluateSettings) -> None:
    """The command; its last line on stdout is the scores as JSON."""
    result = evaluate(config)
    low, high = result["interval"]
    figures = f"{result['pass@1']:.1%} of {result['n']}, 95 % interval {low:.1%} to {high:.1%}"
    if too_long := result["prompts_too_long"]:
        figures += f"; {too_long} prompts are longer than the context and count as wrong"
    print(f"{config.benchmark}: {figures}; template {result['template']}", file=sys.stderr)
    told = {key: result[key] for key in result if key not in ("inputs", "templates", "made_with")}
    print(json.dumps(told, ensure_ascii=False))
