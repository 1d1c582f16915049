"""The completions of an evaluation, graded again without its model: a grader that is mended changes scores."""

import json
import sys
from collections import Counter
from typing import Any

from pipeline.data.jsonl import write_jsonl
from pipeline.errors import UserError
from pipeline.evaluation.folder import write_scores
from pipeline.evaluation.generations import marks, read_generations
from pipeline.run.files import damaged, read_json, replacing, write_atomic
from pipeline.run.verifiers import check_sandbox
from pipeline.settings.tools import GradeSettings
from rewards.reward import Scorer

AT_ONCE = 256
"""Completions handed to the grader's children together."""


def regrade(config: GradeSettings) -> dict[str, Any]:
    """Grade the folder `config.source` into the new folder `config.out`.

    Returns:
        Number of rows by verdict; how many verdicts `changed`; `pass@1`, and what it was `before`.

    Raises:
        UserError: no complete evaluation, a folder that is in use, or one that cannot be written.
    """
    source, out = config.source, config.out
    if config.kind is not None:
        raise UserError(f"grade: --kind is for lines; {source} is a folder, whose rows know their kind")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"grade: {out} exists; name a new folder")
    record, old = read_json(source / "inputs.json"), read_json(source / "scores.json")
    try:
        expected = record["inputs"]["problems"] * record["inputs"]["samples"]
    except (KeyError, TypeError):
        raise UserError(
            f"grade: {source} is no folder of an evaluation: no inputs.json that is one"
        ) from None
    rows = read_generations(source / "generations.jsonl")
    if len(rows) != expected:
        raise UserError(
            f"grade: {source} has {len(rows)} of {expected} completions; finish the evaluation first"
        )
    unsafe = config.allow_unsafe_code
    new = []
    with Scorer({"accuracy": 1.0}, mode=config.mode, allow_unsafe_code=unsafe) as scorer:
        check_sandbox("grade", scorer.pool, [g.rollout.prompt.problem for _, g in rows], unsafe)
        for first in range(0, len(rows), AT_ONCE):
            some = rows[first : first + AT_ONCE]
            graded = scorer.grade_all((g.rollout, g.text) for _, g in some)
            for (row, _), now in zip(some, graded, strict=True):
                new.append(row if row["finish_reason"] is None else row | marks(now, config.mode))
    changed = sum(row["verdict"] != now["verdict"] for (row, _), now in zip(rows, new, strict=True))
    record |= {"graded_again": {"mode": config.mode, "changed": changed}}
    copies = {key: value for key, value in old.get("contamination", {}).items() if key != "without_copies"}
    try:
        with replacing(out) as partial:
            partial.mkdir(parents=True)
            write_jsonl(partial / "generations.jsonl", new)
            write_atomic(partial / "inputs.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            result = write_scores(partial, new, record, copies)
    except ValueError as error:
        raise damaged(source / "generations.jsonl", error) from error
    except OSError as error:
        raise UserError(f"grade: cannot write {out}: {error.strerror}") from error
    print(f"grade: {changed} of {len(new)} verdicts changed", file=sys.stderr)
    before = old.get("pass@1")
    counts = Counter(row["verdict"] for row in new)
    return {**counts, "changed": changed, "pass@1": result["pass@1"], "before": before}
