"""Rows of generations.jsonl: all that is needed to sample and to score them again; and grading them again."""

import json
import sys
from collections import Counter
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pipeline.data.jsonl import JsonObject, write_jsonl
from pipeline.errors import UserError
from pipeline.evaluation.folder import write_scores
from pipeline.evaluation.parts import notes_of
from pipeline.evaluation.saved import read_rows
from pipeline.run.files import damaged, read_json, replacing, write_atomic
from pipeline.run.verifiers import check_sandbox
from pipeline.settings.tools import GradeSettings
from rewards.maths.extract import Mode, final_answer
from rewards.programs.grade import extract_code
from rewards.reward import Scorer
from rollout.types import Graded, Problem, Prompt, Rollout, StdioTest

AT_ONCE = 256
"""Completions that are handed to the grader's children together."""


def row_of(index: int, graded: Graded, prompt: str) -> JsonObject:
    """A graded completion as a row. Its random numbers follow from the evaluation's seed, the number of
    sampled questions before its own, and `sample` (`rollout.sampling.uniform_stream`)."""
    problem, rollout = graded.rollout.prompt.problem, graded.rollout
    asked: JsonObject = {name: getattr(problem, name) for name in ("id", "kind", "question", "answer")}
    asked |= {"source": problem.source, "language": problem.language, "labels": dict(problem.labels)}
    if problem.kind == "code":
        asked["tests"] = [asdict(test) if is_dataclass(test) else test for test in problem.tests]
        asked["shown"] = problem.shown
    length: JsonObject = {"tokens": len(rollout.token_ids), "finish_reason": rollout.finish_reason}
    length |= {"failure": rollout.failure} if rollout.failure else {}
    place = {"index": index, "sample": rollout.sample, "prompt": prompt, "text": graded.text}
    return {**asked, **place, **marks(graded, "lenient"), **length}


def marks(graded: Graded, mode: Mode) -> JsonObject:
    """What the grader says of a completion."""
    code = graded.rollout.prompt.problem.kind == "code"
    answer = extract_code(graded.text) if code else final_answer(graded.text, mode)
    said = {"verdict": graded.verdict, "detail": graded.detail, "parts": dict(graded.parts)}
    return {"extracted": answer, **said}


def read_generations(file: Path, n: int, k: int) -> list[tuple[JsonObject, Graded]]:
    """Each row and the completion that it holds, less its tokens. Raises `UserError`: as `read_rows`."""
    found = []
    for number, row in enumerate(read_rows(file, n, k), 1):
        try:
            given = row["tests"] if row["kind"] == "code" else ()
            tests = tuple(StdioTest(**test) if isinstance(test, dict) else test for test in given)
            about = row["source"], row["language"], row.get("shown", 0), dict(row["labels"])
            problem = Problem(row["id"], row["kind"], row["question"], row["answer"], tests, *about)
            prompt = Prompt(problem, "", ())
            whose = prompt, row["index"], row["sample"], (), (), row["finish_reason"]
            rollout = Rollout(*whose, failure=row.get("failure", ""))
            graded = Graded(rollout, row["text"], row["parts"], 0.0, row["verdict"], row["detail"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(file, f"row {number}: {error}") from error
        found.append((row, graded))
    return found


def regrade(config: GradeSettings) -> dict[str, Any]:
    """Grade the completions of the evaluation `config.source` again, without its model, into the new folder
    `config.out`: number of rows by verdict, how many verdicts `changed`, `pass@1`, and what it was `before`.
    Raises `UserError`: no complete evaluation, a folder that is in use, or one that cannot be written."""
    source, out, unsafe = config.source, config.out, config.allow_unsafe_code
    if config.kind is not None or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        what = "--kind is for lines, not a folder" if config.kind else f"{out} exists; name a new folder"
        raise UserError(f"grade: {what}")
    record, old = read_json(source / "inputs.json"), read_json(source / "scores.json")
    if not isinstance(inputs := record.get("inputs"), dict) or not {"problems", "samples"} <= inputs.keys():
        raise UserError(f"grade: {source} is no folder of an evaluation: no inputs.json that is one")
    n, k = inputs["problems"], inputs["samples"]
    rows, new = read_generations(source / "generations.jsonl", n, k), list[JsonObject]()
    with Scorer({"accuracy": 1.0}, mode=config.mode, allow_unsafe_code=unsafe) as scorer:
        check_sandbox("grade", scorer.pool, [g.rollout.prompt.problem for _, g in rows], unsafe)
        for first in range(0, len(rows), AT_ONCE):
            some = rows[first : first + AT_ONCE]
            graded = scorer.grade_all((g.rollout, g.text) for _, g in some)
            for (row, _), now in zip(some, graded, strict=True):
                new.append(row if row["finish_reason"] is None else row | marks(now, config.mode))
    changed = sum(row["verdict"] != now["verdict"] for (row, _), now in zip(rows, new, strict=True))
    record |= {"graded_again": {"mode": config.mode, "changed": changed}}
    try:
        with replacing(out) as partial:
            partial.mkdir(parents=True)
            write_jsonl(partial / "generations.jsonl", new)
            write_atomic(partial / "inputs.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            result = write_scores(partial, new, record, notes_of(old))
    except OSError as error:
        raise UserError(f"grade: cannot write {out}: {error.strerror}") from error
    print(f"grade: {changed} of {len(new)} verdicts changed", file=sys.stderr)
    counts = Counter(row["verdict"] for row in new)
    return {**counts, "changed": changed, "pass@1": result["pass@1"], "before": old.get("pass@1")}
