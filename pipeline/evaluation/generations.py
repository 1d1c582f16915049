"""Rows of generations.jsonl: all that is needed to score them again, and to sample them again."""

from dataclasses import asdict, is_dataclass
from pathlib import Path

from pipeline.data.jsonl import JsonObject, located
from pipeline.errors import UserError
from rewards.maths.extract import Mode, final_answer
from rewards.programs.grade import extract_code
from rollout.types import Graded, Problem, Prompt, Rollout, StdioTest


def row_of(index: int, graded: Graded, prompt: str, mode: Mode = "lenient") -> JsonObject:
    """A graded completion as a row. The random numbers of a sampled one follow from the evaluation's seed,
    the number of sampled questions before its own, and `sample` (`rollout.sampling.uniform_stream`)."""
    problem, rollout = graded.rollout.prompt.problem, graded.rollout
    asked: JsonObject = {
        "id": problem.id,
        "kind": problem.kind,
        "question": problem.question,
        "answer": problem.answer,
    }
    asked |= {"source": problem.source, "language": problem.language, "labels": dict(problem.labels)}
    if problem.kind == "code":
        tests = [asdict(t) if is_dataclass(t) else t for t in problem.tests]
        asked |= {"tests": tests, "shown": problem.shown}
    length = {"tokens": len(rollout.token_ids), "finish_reason": rollout.finish_reason}
    place = {"index": index, "sample": rollout.sample}
    return {**asked, **place, "prompt": prompt, "text": graded.text, **marks(graded, mode), **length}


def marks(graded: Graded, mode: Mode = "lenient") -> JsonObject:
    """What the grader says of a completion."""
    code = graded.rollout.prompt.problem.kind == "code"
    answer = extract_code(graded.text) if code else final_answer(graded.text, mode)
    said = {"verdict": graded.verdict, "detail": graded.detail, "parts": dict(graded.parts)}
    return {"extracted": answer, **said}


def graded_of(row: JsonObject) -> Graded:
    """A row's completion with its verdict; its tokens and their log-probabilities are not kept."""
    tests = tuple(StdioTest(**t) if isinstance(t, dict) else t for t in row.get("tests", ()))
    told = row["source"], row["language"], row.get("shown", 0), row["labels"]
    problem = Problem(row["id"], row["kind"], row["question"], row["answer"], tests, *told)
    if problem.kind == "code" and not tests:
        raise KeyError("tests")
    rollout = Rollout(Prompt(problem, "", ()), row["index"], row["sample"], (), (), row["finish_reason"])
    return Graded(rollout, row["text"], row["parts"], verdict=row["verdict"], detail=row["detail"])


def read_generations(file: Path) -> list[tuple[JsonObject, Graded]]:
    """Each row, and what it holds. Raises `UserError`: the file cannot be read, or a row is none of ours."""
    found = []
    for where, row in located(file):
        try:
            found.append((row, graded_of(row)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where} is no complete row of an evaluation ({error}); evaluate again into another --out"
            ) from error
    return found
