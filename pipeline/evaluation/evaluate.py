"""`python -m pipeline evaluate`: one model on one benchmark.

Samples k completions a problem, grades them leniently (the answer counts, not the tags), and writes

    generations.jsonl   every completion: text, extracted answer, verdict, tokens, reward parts
    scores.json         `pipeline.evaluation.scores`, and all that is needed to get them again

The folder appears complete or not at all, and is never overwritten: the same command again
returns the scores in it.

Defaults: arXiv:2501.12948, Sec. 3: temperature 0.6, top-p 0.95, 32,768 tokens.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.jsonl import JsonObject, write_jsonl
from pipeline.data.problems import problems
from pipeline.errors import UserError
from pipeline.evaluation.scores import scores
from pipeline.run.files import replacing, sha256, write_atomic
from pipeline.run.verifiers import check_errors, check_sandbox
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.tools.open import check_model, naming, open_speaker, trained_template
from rewards.maths.extract import final_answer
from rewards.programs.grade import extract_code
from rewards.reward import Scorer
from rollout.checkpoint import context_of
from rollout.text.tokenizer import completion_text, make_prompt, prefill, template_hash
from rollout.types import Graded, Problem, Prompt, Rollout

ROOM = 16
"""Tokens that a prompt must leave free in the model's context."""
GRADED_AT_ONCE = 256
T = TypeVar("T")


def evaluate(
    config: EvaluateSettings, model_hash: str | None = None, replace_changed: bool = False
) -> JsonObject:
    """Score a model on a benchmark, or read the scores that `config.out` already holds: scores.json's.
    Raises `UserError`: no such model, no such problems, or `config.out` holds something else.

    Args:
        model_hash: sha256 of the model directory, where the caller has it.
        replace_changed: scores with other inputs are replaced, once the new ones are complete.
    """
    check_model(config.model, config.engine)
    count, seed = config.limit, config.problems_seed
    found = problems(config.benchmark, count=count, seed=seed, data_dir=config.data, rows=config)
    served = f"endpoint:{config.model}" if config.engine == "endpoint" else None
    inputs = inputs_of(config, found, model_hash or served or sha256(config.model))
    if (earlier := earlier_scores(config.out, inputs, replace_changed)) is not None:
        return earlier
    rows, templates = complete(config, found)
    return write(config.out, rows, inputs, templates)


def complete(config: EvaluateSettings, found: list[Problem]) -> tuple[list[JsonObject], dict[str, str]]:
    """Sample and grade: the rows of generations.jsonl in order, and the templates' hashes by name."""
    if batch := config.max_batch:
        vllm, local = replace(config.vllm, max_batch=batch), replace(config.local, max_batch=batch)
        endpoint = replace(config.endpoint, in_flight=min(batch, 1_024))
        config = replace(config, vllm=vllm, local=local, endpoint=endpoint)
    scorer = Scorer({"accuracy": 1.0}, mode="lenient", allow_unsafe_code=config.allow_unsafe_code)
    check_sandbox("evaluate", scorer.pool, found, config.allow_unsafe_code)
    engine, tokenizer = open_speaker(config)
    label = f"{config.model.parent.name} {config.benchmark}"
    with naming(config.model), closing(engine):
        prompts = make_prompts(config, found, tokenizer)
        context = context_of(config.model) if config.engine != "endpoint" else None
        fits = [i for i, p in enumerate(prompts) if context is None or len(p.token_ids) <= context - ROOM]
        rollouts: list[Rollout] = []
        if sent := [prompts[i] for i in fits]:
            room = context - min(len(p.token_ids) for p in sent) if context else config.max_tokens
            limit = min(config.max_tokens, room)
            params = config.params(n=config.samples, seed=config.seed, max_tokens=limit)
            total = len(sent) * config.samples
            rollouts = list(watched(engine.generate(sent, params), f"{label}: sampling", total))
    with scorer:
        verdicts = grade(rollouts, tokenizer, scorer)
        graded = list(watched(verdicts, f"{label}: grading", len(rollouts)))
    check_errors("evaluate", graded, config.max_error_share)
    rows = [row_of(fits[g.rollout.index], g) for g in graded]
    for i, sample in itertools.product(set(range(len(prompts))) - set(fits), range(config.samples)):
        detail = f"prompt longer than the context ({len(prompts[i].token_ids)} tokens)"
        nothing = Graded(Rollout(prompts[i], i, sample, (), (), "length"), "", detail=detail)
        rows.append(row_of(i, nothing) | {"finish_reason": None})
    templates = {name: template_hash(tokenizer, name) for name in sorted({p.template for p in prompts})}
    return sorted(rows, key=lambda row: (row["index"], row["sample"])), templates


def make_prompts(config: EvaluateSettings, found: list[Problem], tokenizer: Tokenizer) -> list[Prompt]:
    """The problems in `config.template`, tokenized."""
    name = config.template
    if name == "auto":
        name = trained_template(config.model) or "auto"
    code = name
    if name == "auto":
        name = code = "boxed" if tokenizer.chat_template else "raw"
        if name == "boxed":  # a program has no box: the chat template alone, with its own opening
            code = "r1" if prefill(tokenizer, "boxed") else "plain"
    return [make_prompt(tokenizer, p, code if p.kind == "code" else name) for p in found]


def watched(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """The items; meanwhile a line on stderr with the time left, but nothing where stderr is a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total, description=label)


def grade(rollouts: Sequence[Rollout], tokenizer: Tokenizer, scorer: Scorer) -> Iterator[Graded]:
    """The rollouts with their verdicts, in order."""
    for start in range(0, len(rollouts), GRADED_AT_ONCE):
        some = rollouts[start : start + GRADED_AT_ONCE]
        yield from scorer.grade_all((r, completion_text(tokenizer, r, r.prompt.template)) for r in some)


def row_of(index: int, graded: Graded) -> JsonObject:
    """A graded completion as a row of generations.jsonl."""
    problem, rollout = graded.rollout.prompt.problem, graded.rollout
    answer = extract_code(graded.text) if problem.kind == "code" else final_answer(graded.text, "lenient")
    asked = {"id": problem.id, "kind": problem.kind, "question": problem.question, "answer": problem.answer}
    mark = {"verdict": graded.verdict, "detail": graded.detail, "parts": dict(graded.parts)}
    length = {"tokens": len(rollout.token_ids), "finish_reason": rollout.finish_reason}
    place = {"index": index, "sample": rollout.sample}
    return {**asked, **place, "text": graded.text, "extracted": answer, **mark, **length}


# ---- the folder


def inputs_of(config: EvaluateSettings, found: Sequence[Problem], model_hash: str) -> JsonObject:
    """Whatever changes the scores; scores with equal inputs are the same scores."""
    digest = hashlib.sha256(json.dumps([asdict(p) for p in found]).encode()).hexdigest()
    sampling = ("temperature", "top_p", "top_k", "max_tokens", "seed")
    settings = ("engine", "samples", "template", "dtype", *sampling)
    return {
        **{"benchmark": config.benchmark, "problems": len(found), "problems_sha256": digest},
        **{"model": str(config.model), "model_sha256": model_hash},
        **{name: getattr(config, name) for name in settings},
    }


def earlier_scores(out: Path, inputs: JsonObject, replace_changed: bool) -> JsonObject | None:
    """The scores in `out`, if they have the same inputs; `None` where there are none, or some to replace.
    Raises `UserError`: `out` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        earlier: JsonObject = json.loads((out / "scores.json").read_text(encoding="utf-8"))
        before = earlier["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} exists and holds no scores of ours; take another --out") from None
    # Where the model lies does not matter, only what it is.
    for key in (k for k in inputs if k != "model" and before.get(k) != inputs[k]):
        if replace_changed:
            return None
        difference = f"{key} {before.get(key)!r}, not {inputs[key]!r}"
        raise UserError(f"{out} holds scores with {difference}; take another --out")
    return earlier


def write(out: Path, rows: list[JsonObject], inputs: JsonObject, templates: dict[str, str]) -> JsonObject:
    """Both files, in a folder that appears complete."""
    result = {
        **scores(rows),
        "template": "+".join(templates),
        "template_hash": "+".join(templates.values()),
        "model_hash": inputs["model_sha256"],
        "sampling": {key: inputs[key] for key in ("temperature", "top_p", "max_tokens", "seed")},
        "inputs": inputs,
    }
    try:
        with replacing(out) as partial:
            partial.mkdir(parents=True)
            write_jsonl(partial / "generations.jsonl", rows)
            write_atomic(partial / "scores.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return result


def main(config: EvaluateSettings) -> None:
    """The command; its last line on stdout is the scores as JSON."""
    result = evaluate(config)
    low, high = result["interval"]
    figures = f"{result['pass@1']:.1%} of {result['n']}, 95 % interval {low:.1%} to {high:.1%}"
    print(f"{config.benchmark}: {figures}; template {result['template']}", file=sys.stderr)
    print(json.dumps({key: value for key, value in result.items() if key != "inputs"}, ensure_ascii=False))
