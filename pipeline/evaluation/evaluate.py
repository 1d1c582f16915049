"""`python -m pipeline evaluate`: one model on one benchmark.

Samples k completions a problem and grades them leniently (the answer counts, not the tags), part by part, into
a folder that grows meanwhile and can always go on (`pipeline.evaluation.folder`). A part is the same questions
whatever was killed before and however many workers there are, and is generated together: so are its bits.

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
from pipeline.evaluation.folder import Folder
from pipeline.evaluation.generations import read_generations, row_of
from pipeline.evaluation.parts import copies_in
from pipeline.evaluation.prompts import make_prompts, samples_of, worked_shots
from pipeline.run.environment import environment
from pipeline.run.files import sha256
from pipeline.run.verifiers import check_errors, check_sandbox
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.tools.open import check_model, naming, open_speaker
from pipeline.train.place import device_named
from rewards.reward import Scorer
from rollout.checkpoint import context_of
from rollout.engine import RolloutEngine
from rollout.open import Workers
from rollout.text.templates import next_question
from rollout.text.tokenizer import Shots, completion_text, template_hash
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
    check_model(config.model)
    count, seed = config.limit, config.problems_seed
    found = problems(config.benchmark, count=count, seed=seed, data_dir=config.data, rows=config)
    config = replace(config, samples=samples_of(config, len(found)))
    shots = worked_shots(config, found)
    copies = copies_in(config, found)
    inputs = inputs_of(config, found, shots, model_hash or sha256(config.model))
    folder = Folder(config.out, inputs, replace_changed)
    earlier = folder.earlier()
    if earlier and all(earlier.get("contamination", {}).get(key) == copies[key] for key in copies):
        return earlier
    return complete(config, found, shots, folder, copies, pause)


def inputs_of(
    config: EvaluateSettings, found: Sequence[Problem], shots: Shots, model_hash: str
) -> JsonObject:
    """Whatever changes the completions; folders with equal inputs hold the same evaluation."""
    sampling = ("temperature", "top_p", "top_k", "max_tokens", "seed", "save_every")
    settings = ("engine", "samples", "template", "dtype", *sampling)
    inputs: JsonObject = {
        **{"benchmark": config.benchmark, "problems": len(found)},
        "problems_sha256": digest([asdict(problem) for problem in found]),
        **{"model": str(config.model), "model_sha256": model_hash},
        **{name: getattr(config, name) for name in settings},
    }
    if shots:
        inputs |= {"shots": len(shots), "shots_sha256": digest(shots)}
    if config.engine == "vllm":
        vllm = config.vllm
        inputs["vllm"] = {"quantization": vllm.quantization, "kv_dtype": vllm.kv_dtype}
        inputs["vllm"] |= {"context": vllm.context, "seed_each": vllm.seed_each}
    return inputs


def digest(value: object) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def made_with(config: EvaluateSettings) -> JsonObject:
    """What the bits may depend on beside the inputs: code, packages, machine, threads and batch."""
    env, root = environment(), Path(__file__).parents[2]
    code = {str(file.relative_to(root)): sha256(file) for top in CODE for file in (root / top).rglob("*.py")}
    threads = config.threads or (1 if config.workers else torch.get_num_threads())
    own = {"device": str(device_named(config.device)), "threads": threads, "max_batch": config.max_batch}
    seen = {key: env[key] for key in ("commit", "python", "packages", "machine")}
    return {"code_sha256": digest(sorted(code.items())), **seen, **own}


# ---- parts


@dataclass(frozen=True, slots=True)
class Plan:
    """The questions of an evaluation, in parts that are generated together."""

    prompts: Sequence[Prompt]
    fits: Sequence[int]
    """Indices of the questions that leave room in the model's context: those that are sampled."""
    size: int
    """Of them in a part."""

    @property
    def ends(self) -> list[int]:
        """Index of the question after each part's last; what does not fit belongs to the part before it."""
        return [*self.fits[self.size :: self.size], len(self.prompts)]


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
        config = replace(config, vllm=vllm, local=local)
    scorer = Scorer({"accuracy": 1.0}, mode="lenient", allow_unsafe_code=config.allow_unsafe_code)
    check_sandbox("evaluate", scorer.pool, found, config.allow_unsafe_code)
    size = max(1, config.save_every // config.samples)
    pool = Workers(config.workers, config.threads, task_prompts=size)
    engine, tokenizer = open_speaker(config, pool)
    with closing(engine), scorer:
        with naming(config.model):
            prompts = make_prompts(config, found, tokenizer, shots)
            shown = {p.template for p in prompts if p.problem.kind != "code"}
            names = sorted({p.template for p in prompts})
            templates = {n: template_hash(tokenizer, n, shots if n in shown else ()) for n in names}
            context = context_of(config.model)
        fits = [i for i, p in enumerate(prompts) if context is None or len(p.token_ids) <= context - ROOM]
        plan = Plan(prompts, fits, size)
        with folder.growing(templates, made_with(config)):
            ends = [end * config.samples for end in plan.ends]
            part = folder.resume(ends)
            label = f"{config.benchmark}: {config.samples} samples a problem, {'+'.join(templates)}"
            if part < len(ends):
                print(f"evaluate {config.model}: {label}", file=sys.stderr, flush=True)
            arriving = sampled(config, engine, plan, part)
            with closing(watched(arriving, label, part * size, len(fits), config.samples)) as rollouts:
                for done in in_parts(rollouts, plan, part, config.samples):
                    folder.append(graded_rows(done, plan, part, scorer, tokenizer, config))
                    part += 1
                    pause()
            kept = read_generations(folder.path / "generations.jsonl")
            check_errors("evaluate", [graded for _, graded in kept], config.max_error_share)
            return folder.finish([row for row, _ in kept], copies)


def sampled(config: EvaluateSettings, engine: RolloutEngine, plan: Plan, part: int) -> Iterator[Rollout]:
    """The rollouts of all parts from `part` on; `index` counts the questions that fit. In this process one
    request a part, so that a part is all that shares a batch; of workers, each has a part at a time."""
    sent = [plan.prompts[i] for i in plan.fits]
    if not sent:
        return
    context = context_of(config.model)
    room = context - min(len(p.token_ids) for p in sent) if context else config.max_tokens
    limit = min(config.max_tokens, room)
    params = config.params(n=config.samples, seed=config.seed, max_tokens=limit)
    marks = {next_question(p.template) for p in sent} if config.shots else set[str]()
    params = replace(params, stop=tuple(sorted(marks - {""})))
    pooled = config.workers or config.vllm.data_parallel > 1
    for first in range(part * plan.size, len(sent), len(sent) if pooled else plan.size):
        request = sent[first:] if pooled else sent[first : first + plan.size]
        with naming(config.model):
            for rollout in engine.generate(request, replace(params, first_index=first)):
                yield replace(rollout, index=first + rollout.index)


def in_parts(rollouts: Iterable[Rollout], plan: Plan, part: int, samples: int) -> Iterator[list[Rollout]]:
    """The rollouts of each part from `part` on, complete and in order.
    Raises `RuntimeError`: the engine lost a rollout, or returned one twice."""
    held = defaultdict[int, list[Rollout]](list)
    arriving = iter(rollouts)
    for number in range(part, len(plan.ends)):
        due = range(number * plan.size, min((number + 1) * plan.size, len(plan.fits)))
        while len(held[number]) < len(due) * samples and (rollout := next(arriving, None)):
            held[rollout.index // plan.size].append(rollout)
        done = sorted(held.pop(number), key=lambda r: (r.index, r.sample))
        if [(r.index, r.sample) for r in done] != [(i, s) for i in due for s in range(samples)]:
            raise RuntimeError(f"the engine lost rollouts of questions {due.start} to {due.stop - 1}")
        yield done


def graded_rows(
    rollouts: Sequence[Rollout],
    plan: Plan,
    part: int,
    scorer: Scorer,
    tokenizer: Tokenizer,
    config: EvaluateSettings,
) -> list[JsonObject]:
    """A part's rows, in order; questions that do not fit are wrong, and say so."""
    pairs = []
    for r in rollouts:
        text, mark = completion_text(tokenizer, r, r.prompt.template), next_question(r.prompt.template)
        pairs.append((r, text.partition(mark)[0] if config.shots and mark else text))
    graded = {(plan.fits[g.rollout.index], g.rollout.sample): g for g in scorer.grade_all(pairs)}
    rows = []
    for index in range(([0, *plan.ends])[part], plan.ends[part]):
        prompt = plan.prompts[index]
        asked = str(tokenizer.decode(list(prompt.token_ids), clean_up_tokenization_spaces=False))
        for sample in range(config.samples):
            if (done := graded.get((index, sample))) is not None:
                rows.append(row_of(index, done, asked))
                continue
            detail = f"prompt longer than the context ({len(prompt.token_ids)} tokens)"
            nothing = Graded(Rollout(prompt, index, sample, (), (), "length"), "", detail=detail)
            rows.append(row_of(index, nothing, asked) | {"finish_reason": None})
    return rows


def watched(
    rollouts: Iterable[Rollout], label: str, done: int, questions: int, samples: int
) -> Generator[Rollout]:
    """The rollouts; meanwhile a line on stderr with the time left, but nothing where stderr is a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(rollouts, questions * samples, done * samples, description=label)


def main(config: EvaluateSettings) -> None:
    """The command; its last line on stdout is the scores as JSON."""
    result = evaluate(config)
    low, high = result["interval"]
    figures = f"{result['pass@1']:.1%} of {result['n']}, 95 % interval {low:.1%} to {high:.1%}"
    print(f"{config.benchmark}: {figures}; template {result['template']}", file=sys.stderr)
    hidden = ("inputs", "templates", "made_with")
    told = {key: value for key, value in result.items() if key not in hidden}
    print(json.dumps(told, ensure_ascii=False))
