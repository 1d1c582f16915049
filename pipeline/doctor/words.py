"""What shows with the model's tokenizer: ids that are not the text's, lost end tokens, broken templates."""

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from pipeline.doctor.findings import Finding
from pipeline.doctor.read import Dump, Line
from pipeline.errors import UserError
from pipeline.run.files import read_json
from rollout.checkpoint import eos_ids
from rollout.text.templates import TEMPLATES
from rollout.text.tokenizer import control_tokens, encode_text, load_tokenizer, render

ENOUGH = 0.05
"""Share of the rollouts that show a fault, at least two; sampling alone makes other ids in up to 2 %."""
PROBE = "\ufdd1"
"""Stands for the question; no character."""


def examine_words(dump: Dump, model: Path) -> list[Finding]:
    """All that shows with the tokenizer of `model`. Raises `UserError`: it cannot be read."""
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    stops = eos_ids(model, tokenizer.eos_token_id)
    found = [] if dump.turns else [retokenised(dump, tokenizer), ended(dump, tokenizer, stops)]
    found.append(template(dump, tokenizer, model))
    return [each for each in found if each]


def _many(bad: int, of: int) -> bool:
    return bad >= max(2, ENOUGH * of)


def retokenised(dump: Dump, tokenizer: PreTrainedTokenizerFast) -> Finding | None:
    """Ids that are not what the text has, or as many as there are log-probabilities."""
    rows = [row for row in dump.rows if row.ids and (row.text is not None or row.engine is not None)]
    odd = [row for row in rows if row.engine is not None and len(row.engine) != len(row.ids)]
    hidden = control_tokens(tokenizer)
    for row in (row for row in rows if row.text is not None):
        shown = [i for i in row.ids if i not in hidden]
        if not any(_ends(encode_text(tokenizer, row.text or ""), ids) for ids in (shown, [*row.ids])):
            odd.append(row)
    odd = list({id(row): row for row in odd}.values())
    if not _many(len(odd), len(rows)):
        return None
    what = f"{len(odd)} of {len(rows)} completions have other ids than their text, or than were scored"
    return Finding("retokenised", f"{what}; the first: step {odd[0].step:g}, {len(odd[0].ids)} ids")


def _ends(ids: list[int], end: list[int]) -> bool:
    """Whether `ids` end so: a text may begin with what the template wrote."""
    return len(end) <= len(ids) and ids[len(ids) - len(end) :] == end


def ended(dump: Dump, tokenizer: PreTrainedTokenizerFast, stops: frozenset[int]) -> Finding | None:
    """Completions that were not cut lack their end token, or go on behind one."""
    rows = [row for row in dump.rows if row.ids]
    most = max((len(row.ids) for row in rows), default=0)
    free = [row for row in rows if not (len(row.ids) == most if row.cut is None else row.cut)]
    lost = sum(row.ids[-1] not in stops for row in free)
    names = [str(tokenizer.decode([i])) for i in stops]
    behind = sum(bool(stops & set(row.ids[:-1])) for row in rows)
    behind += sum(any(name in (row.text or "").rstrip()[: -len(name)] for name in names if name)
                  for row in dump.rows if not row.ids)  # fmt: skip
    if stops and lost >= max(2, 0.5 * len(free)):
        return Finding(
            "eos", f"{lost} of {len(free)} completions that were not cut have no end token {sorted(stops)}"
        )
    if _many(behind, len(dump.rows)):
        return Finding(
            "eos", f"{behind} of {len(dump.rows)} completions go on behind an end token {sorted(stops)}"
        )
    return None


def template(dump: Dump, tokenizer: PreTrainedTokenizerFast, model: Path) -> Finding | None:
    """Prompts that do not begin and end as the model's template does, or with its leading token twice. The
    template is that which the model was trained with, if it says so, else any that we know or its own."""
    said = read_json(model / "pipeline.json").get("template") if (model / "pipeline.json").is_file() else None
    names = (
        [said]
        if said in TEMPLATES
        else [n for n, t in TEMPLATES.items() if tokenizer.chat_template or not t.chat]
    )
    frames = [render(tokenizer, PROBE, name).partition(PROBE)[::2] for name in names]
    special = (
        "|".join(map(re.escape, sorted(control_tokens(tokenizer).values(), key=len, reverse=True))) or "(?!)"
    )
    bos = tokenizer.bos_token or ""
    bare = [tuple(re.sub(special, "", part) for part in frame) for frame in frames]
    rows = [row for row in dump.rows if row.prompt_ids or row.prompt]

    def fits(row: Line) -> bool:
        if row.prompt_ids:
            text = str(tokenizer.decode([*row.prompt_ids], clean_up_tokenization_spaces=False))
            text = text if any(front.startswith(bos) for front, _ in frames) else text.removeprefix(bos)
            return _framed(text, frames) and not text.startswith(bos * 2 if bos else "\0")
        return not re.search(special, row.prompt) or _framed(row.prompt, [*frames, *bare])

    odd = [row for row in rows if not fits(row)]
    if not _many(len(odd), len(rows)):
        return None
    text = tokenizer.decode([*odd[0].prompt_ids]) if odd[0].prompt_ids else odd[0].prompt
    what = f"{len(odd)} of {len(rows)} prompts are not as {said or 'a template of the model'} makes them"
    return Finding("template", f"{what}; the first begins {str(text)[:30]!r} and ends {str(text)[-30:]!r}")


def _framed(text: str, frames: Sequence[tuple[str, ...]]) -> bool:
    return any(text.startswith(front) and text.endswith(back) for front, back in frames)
