"""`python -m pipeline generate`: completions from any checkpoint, one JSON line a rollout."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from pipeline.data.jsonl import JsonObject, read_jsonl, write_jsonl
from pipeline.errors import UserError
from pipeline.settings.tools import GenerateSettings
from pipeline.tools.open import naming, open_model
from rollout.text.tokenizer import completion_text, encode_raw
from rollout.types import Problem, Prompt, Rollout


def prompt_rows(file: Path) -> Iterator[tuple[int, JsonObject]]:
    """Line number and object of each prompt.

    Raises:
        UserError: the file cannot be read, or by its number a line that is no prompt.
    """
    for number, row in read_jsonl(file):
        ids = row.get("token_ids")
        is_ids = isinstance(ids, list) and all(type(i) is int for i in ids)  # JSON's true is an int, no token
        if not is_ids and not isinstance(row.get("prompt"), str):
            raise UserError(f'{file}:{number}: expected {{"prompt": text}} or {{"token_ids": [integers]}}')
        yield number, row


def prompts_of(
    file: Path, rows: list[tuple[int, JsonObject]], tokenizer: PreTrainedTokenizerFast | None
) -> list[Prompt]:
    """The prompts of a file's rows; token ids win where a line has both."""
    prompts = []
    for number, row in rows:
        problem = Problem(id=str(number), kind="general", question=row.get("prompt") or "")
        if "token_ids" in row:
            prompt = Prompt(problem=problem, template="raw", token_ids=tuple(row["token_ids"]))
        elif tokenizer is None:
            raise UserError(f"{file}:{number}: the model has no tokenizer; give token_ids, not text")
        else:
            try:
                prompt = Prompt(problem, "raw", tuple(encode_raw(tokenizer, problem.question)))
            except ValueError as error:
                raise UserError(f"{file}:{number}: {error}") from error
        if not prompt.token_ids:
            raise UserError(f"{file}:{number}: the prompt is empty; it needs at least one token")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{file} has no prompts")
    return prompts


def check_writable(file: Path, source: Path) -> None:
    """Raise `UserError` where `file` cannot be written, or is the input: known before a model is loaded for
    minutes."""
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


def rollout_row(rollout: Rollout, tokenizer: PreTrainedTokenizerFast | None) -> JsonObject:
    """A rollout as a row of the output; `text` is null when the model has no tokenizer."""
    return {
        "index": rollout.index,
        "sample": rollout.sample,
        "token_ids": list(rollout.token_ids),
        "logprobs": list(rollout.logprobs),
        "text": completion_text(tokenizer, rollout, "raw") if tokenizer else None,
        "finish_reason": rollout.finish_reason,
    }


def main(config: GenerateSettings) -> None:
    """The command; its last line on stdout is the summary as JSON. `seconds` is generation alone."""
    rows = list(prompt_rows(config.prompts))  # bad lines are reported before a model is loaded for minutes
    check_writable(config.out, config.prompts)
    engine, tokenizer = open_model(config)
    prompts = prompts_of(config.prompts, rows, tokenizer)
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
