"""`python -m pipeline generate`: completions from any checkpoint, one JSON line a rollout."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.data.jsonl import BadRow, JsonObject, located, object_of, write_jsonl
from pipeline.errors import UserError
from pipeline.settings.tools import GenerateSettings
from pipeline.tools.open import naming, open_model
from rollout.text.tokenizer import completion_text, encode_raw
from rollout.types import Problem, Prompt, Rollout


def prompt_rows(file: Path) -> list[tuple[str, JsonObject]]:
    """Where each prompt stands, and its row.
    Raises `UserError`: the file cannot be read or has no prompts, or, by its number, a row is none."""
    rows = []
    for where, row in located(file):
        try:
            ids = object_of(row).get("token_ids")
            is_ids = isinstance(ids, list) and all(type(i) is int for i in ids)  # true is an int, no token
            if not is_ids and not isinstance(row.get("prompt"), str):
                raise BadRow('expected {"prompt": text} or {"token_ids": [integers]}')
        except BadRow as error:
            raise UserError(f"{where}: {error}") from error
        rows.append((where, row))
    if not rows:
        raise UserError(f"{file} has no prompts")
    return rows


def prompts_of(rows: list[tuple[str, JsonObject]], tokenizer: Tokenizer | None) -> Iterator[Prompt]:
    """The prompts of a file's rows; token ids win where a row has both."""
    for where, row in rows:
        problem, ids = (
            Problem(id=where, kind="general", question=row.get("prompt") or ""),
            row.get("token_ids"),
        )
        if ids is None and tokenizer is None:
            raise UserError(f"{where}: the model has no tokenizer; give token_ids, not text")
        try:
            ids = encode_raw(tokenizer, problem.question) if ids is None and tokenizer else ids
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if not ids:
            raise UserError(f"{where}: the prompt is empty; it needs at least one token")
        yield Prompt(problem, "raw", tuple(ids))


def check_writable(file: Path, source: Path) -> None:
    """Raise `UserError` where `file` cannot be written, or is the input: known before a model is loaded."""
    if file.exists() and file.samefile(source):
        raise UserError(f"{file} is the input itself; choose another --out")
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose another --out") from error


def rollout_row(rollout: Rollout, tokenizer: Tokenizer | None) -> JsonObject:
    """A rollout as a row of the output; `text` is null when the model has no tokenizer, `token_ids` and
    `logprobs` when it is an endpoint's."""
    text = completion_text(tokenizer, rollout, "raw") if tokenizer else None
    served = rollout.text is not None
    ids, logprobs = (None, None) if served else (list(rollout.token_ids), list(rollout.logprobs))
    row = {"index": rollout.index, "sample": rollout.sample, "token_ids": ids, "logprobs": logprobs}
    return row | {"text": text, "finish_reason": rollout.finish_reason}


def main(config: GenerateSettings) -> None:
    """The command; its last line on stdout is the summary as JSON. `seconds` is generation alone."""
    rows = prompt_rows(config.prompts)  # bad ones are reported before a model is loaded for minutes
    check_writable(config.out, config.prompts)
    engine, tokenizer = open_model(config)
    prompts = list(prompts_of(rows, tokenizer))
    start = time.perf_counter()
    with naming(config.prompts):  # bad prompts are refused at once
        generated = engine.generate(prompts, config.params(n=config.samples, seed=config.seed))
    with naming(config.model), closing(engine):
        rollouts = sorted(generated, key=lambda r: (r.index, r.sample))
        seconds = time.perf_counter() - start
    write_jsonl(config.out, (rollout_row(rollout, tokenizer) for rollout in rollouts))
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    figures: dict[str, object] = {
        "rollouts": len(rollouts),
        "tokens": tokens,
        "seconds": round(seconds, 6),
        "tokens_per_s": round(tokens / seconds, 3),
        "engine": type(engine).__name__.removesuffix("Engine").lower(),
    }
    figures |= {name.removeprefix("rollout/"): round(value, 4) for name, value in engine.drain().items()}
    print(json.dumps(figures))
