"""`python -m pipeline generate`: draw completions from any checkpoint, one JSON line a rollout."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.settings.tools import GenerateSettings
from pipeline.tools.open import open_model
from rollout.engine import EngineDied
from rollout.types import Problem, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each non-blank line.

    Raises:
        UserError: a file that cannot be read, or the number of a line that is not a prompt.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read the prompts {file}: {reason}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from error
        ids = row.get("token_ids") if isinstance(row, dict) else None
        is_ids = isinstance(ids, list) and all(
            type(i) is int for i in ids
        )  # JSON's true is no token, yet an int
        if not is_ids and not (isinstance(row, dict) and isinstance(row.get("prompt"), str)):
            raise UserError(f'{file}, line {number}: want {{"prompt": text}} or {{"token_ids": [integers]}}')
        yield number, row


def read_prompts(file: Path, tokenizer: PreTrainedTokenizerFast | None) -> list[Prompt]:
    """The prompts of a file; token ids win where a line has both."""
    from rollout.text.tokenizer import make_prompt

    prompts = []
    for number, row in read_lines(file):
        problem = Problem(id=str(number), kind="general", question=row.get("prompt") or "")
        if "token_ids" in row:
            prompt = Prompt(problem=problem, template="raw", token_ids=tuple(row["token_ids"]))
        elif tokenizer is None:
            raise UserError(f"{file}, line {number}: the model has no tokenizer; give token_ids, not text")
        else:
            prompt = make_prompt(tokenizer, problem, "raw")
        if not prompt.token_ids:
            raise UserError(f"{file}, line {number}: the prompt is empty; it needs at least one token")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{file} has no prompts")
    return prompts


def prepare(file: Path) -> Path:
    """A file beside `file` to write to first, so that `file` is whole or absent; checked to be writable."""
    part = file.with_name(file.name + ".part")
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        file.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose another --out") from error
    return part


def line(rollout: Rollout, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """A rollout as one line of JSON; `text` is null when the model has no tokenizer."""
    from rollout.text.tokenizer import completion_text

    row = {
        "index": rollout.index,
        "sample": rollout.sample,
        "token_ids": rollout.token_ids,
        "logprobs": rollout.logprobs,
        "text": completion_text(tokenizer, rollout, "raw") if tokenizer else None,
        "finish_reason": rollout.finish_reason,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def run(config: GenerateSettings) -> dict[str, object]:
    """Generate, write, and say what it took. `seconds` is generation alone."""
    for _ in read_lines(config.prompts):  # before a model is loaded for minutes
        pass
    part = prepare(config.out)
    engine, tokenizer = open_model(config)
    prompts = read_prompts(config.prompts, tokenizer)
    start = time.perf_counter()
    try:
        params = config.params(n=config.samples, seed=config.seed)
        drawn = engine.generate(prompts, params)  # refuses bad prompts at once
    except ValueError as error:
        raise UserError(f"{config.prompts}: {error}") from error
    try:
        rollouts = sorted(drawn, key=lambda r: (r.index, r.sample))
    except (FloatingPointError, EngineDied) as error:
        raise UserError(f"{config.model}: {error}") from error
    seconds = time.perf_counter() - start
    engine.close()
    with part.open("w", encoding="utf-8") as lines:
        lines.writelines(line(rollout, tokenizer) for rollout in rollouts)
    os.replace(part, config.out)
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    more = {name.removeprefix("rollout/"): round(value, 4) for name, value in engine.drain().items()}
    return {
        "rollouts": len(rollouts),
        "tokens": tokens,
        "seconds": round(seconds, 6),
        "tokens_per_s": round(tokens / seconds, 3),
        "engine": type(engine).__name__.removesuffix("Engine").lower(),
    } | more


def main(config: GenerateSettings) -> int:
    """The command; its last line on stdout is the summary as JSON."""
    print(json.dumps(run(config)))
    return 0
