"""Evaluations as they lie in their folders: scores.json and generations.jsonl, read and checked."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, create_model

from pipeline.data.jsonl import BadRow, JsonObject, located, object_of
from pipeline.errors import UserError
from pipeline.run.files import damaged, read_json

Share = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=0)]
UNFINISHED = "is not finished: its `evaluate` command, given again, goes on"


def shape(name: str, **keys: Any) -> Any:
    """A validator of objects with these keys, and any others."""
    fields: dict[str, Any] = {key: (kind, ...) for key, kind in keys.items()}
    return create_model(name, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)


SCORES = shape(
    "scores.json",
    **{"pass@1": Share, "pass@k": Share, "n": Annotated[int, Field(ge=1)], "k": Annotated[int, Field(ge=1)]},
    **{"interval": Annotated[list[Share], Field(min_length=2, max_length=2)], "verifier_failures": Whole},
    **{"mean_tokens": Annotated[float, Field(ge=0)] | None, "template_hash": str},
    **{"truncation_rate": Share | None, "sampling": dict[str, float]},
    **{"inputs": shape("inputs", benchmark=str, problems_sha256=str, model=str), "cons@k": Share | None},
)
ROW = shape(
    "row of generations.jsonl",
    **{"index": Whole, "sample": Whole, "id": str, "question": str, "answer": str | None, "text": str},
    **{"verdict": Literal["correct", "incorrect", "error"], "detail": str, "tokens": Whole},
    **{"finish_reason": str | None, "extracted": str | None, "kind": str, "parts": dict[str, float]},
)


def read_scores(folder: Path) -> JsonObject:
    """scores.json of a finished evaluation. Raises `UserError`: it is not finished, or damaged."""
    file = folder / "scores.json"
    if not file.is_file():
        if (folder / "generations.jsonl").is_file():
            raise UserError(f"{folder} {UNFINISHED}")
        below = ", ".join(sorted(str(f.parent) for f in folder.glob("*/scores.json"))[:8])
        way = f"one of {below}" if below else "an --out folder of `evaluate`"
        raise UserError(f"{folder} is no evaluation, it has no scores.json; name {way}")
    found = read_json(file)
    check(SCORES, found, file)
    return found


def read_rows(file: Path, n: int, k: int) -> list[JsonObject]:
    """The rows of generations.jsonl, the k samples of each of n questions, in order.
    Raises `UserError`: the file cannot be read, or holds anything else."""
    rows = list[JsonObject]()
    for place, row in located(file):
        check(ROW, row, file, f"{place.removeprefix(f'{file}:')}: ")
        rows.append(row)
    rows.sort(key=lambda row: (row["index"], row["sample"]))
    if [(row["index"], row["sample"]) for row in rows] != [(i, j) for i in range(n) for j in range(k)]:
        error = damaged(file, f"{len(rows)} rows, which are not {k} samples of each of {n} questions")
        raise error if (file.parent / "scores.json").exists() else UserError(f"{file.parent} {UNFINISHED}")
    return rows


def read_questions(folder: Path, scores: JsonObject) -> list[list[JsonObject]]:
    """The samples of each question, in order, n k. Raises `UserError`: as `read_rows`, or generations.jsonl
    does not hold the samples that the scores are of."""
    rows = read_rows(file := folder / "generations.jsonl", n := scores["n"], k := scores["k"])
    right = sum(row["verdict"] == "correct" for row in rows)
    if abs(right / (n * k) - scores["pass@1"]) > 1e-9:
        raise damaged(file, f"{right} of {n * k} are right, where scores.json has {scores['pass@1']:.4f}")
    return [rows[i : i + k] for i in range(0, n * k, k)]


def check(model: Any, found: Any, file: Path, place: str = "") -> None:
    """Raises `UserError`: what was read is not of the shape, by the first key that is not."""
    try:
        model.model_validate(object_of(found))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise damaged(file, f"{place}{key}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    except BadRow as error:
        raise damaged(file, f"{place}{error}") from error
