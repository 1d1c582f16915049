"""Evaluations as they lie in their folders: scores.json and generations.jsonl, read and checked."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.jsonl import BadRow, located, object_of
from pipeline.errors import UserError
from pipeline.run.files import damaged, read_json

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Rows and scores that we wrote: what is read of them, and checked."""

    model_config = ConfigDict(strict=True, frozen=True)


class Inputs(Record):
    """What an evaluation depended on."""

    model_config = ConfigDict(extra="allow")
    benchmark: str
    problems_sha256: str
    model: str
    model_sha256: str


class ScoreFile(Record):
    """scores.json."""

    pass_1: Share = Field(alias="pass@1")
    pass_k: Share = Field(alias="pass@k")
    cons_k: Share | None = Field(alias="cons@k")
    interval: Annotated[list[Share], Field(min_length=2, max_length=2)]
    stderr: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1)]
    k: Annotated[int, Field(ge=1)]
    truncation_rate: Share | None
    mean_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    verifier_failures: Whole
    template: str
    template_hash: str
    sampling: dict[str, float]
    inputs: Inputs

    def made_as(self) -> dict[str, Any]:
        """What two scores of one benchmark must have in common to be comparable, by name."""
        own = {"problems": self.inputs.problems_sha256[:8], "k": self.k, "template": self.template_hash[:8]}
        return own | {key: value for key, value in self.sampling.items() if key != "seed"}


class Row(Record):
    """A row of generations.jsonl."""

    index: Whole
    sample: Whole
    id: str
    question: str
    answer: str | None = None
    text: str
    verdict: Literal["correct", "incorrect", "error"]
    tokens: Whole
    finish_reason: str | None
    detail: str = ""
    labels: dict[str, Any] | None = None


def read_scores(folder: Path) -> ScoreFile:
    """A finished evaluation's scores. Raises `UserError`: not finished, or scores.json is damaged."""
    file = folder / "scores.json"
    if not file.is_file():
        begun = (folder / "generations.jsonl").is_file()
        below = ", ".join(sorted(str(f.parent) for f in folder.glob("*/scores.json"))[:8])
        if begun:
            raise UserError(f"{folder} is not finished: its `evaluate` command, given again, goes on")
        way = f"one of {below}" if below else "an --out folder of `evaluate`"
        raise UserError(f"{folder} is no evaluation, it has no scores.json; name {way}")
    try:
        return ScoreFile.model_validate(read_json(file))
    except (ValidationError, OSError) as error:
        raise damaged(file, first_error(error)) from error


def first_error(error: Exception) -> str:
    """The first thing that is wrong, with the name of its key."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"


def read_questions(folder: Path, scores: ScoreFile) -> list[list[Row]]:
    """The samples of each question, in order, n k. Raises `UserError`: generations.jsonl cannot be read, a row
    is damaged, or they are not the samples that the scores are of."""
    file, rows = folder / "generations.jsonl", list[Row]()
    for place, row in located(file):
        try:
            rows.append(Row.model_validate(object_of(row)))
        except (BadRow, ValidationError) as error:
            raise damaged(
                file, f"{place.removeprefix(str(file)).lstrip(': ')}: {first_error(error)}"
            ) from error
    n, k = scores.n, scores.k
    rows.sort(key=lambda row: (row.index, row.sample))
    if [(row.index, row.sample) for row in rows] != [(i, j) for i in range(n) for j in range(k)]:
        raise damaged(file, f"{len(rows)} rows that are not the {k} samples of each of {n} questions")
    right = sum(row.verdict == "correct" for row in rows)
    if abs(right / (n * k) - scores.pass_1) > 1e-9:
        raise damaged(file, f"{right} of {n * k} are right, and scores.json says {scores.pass_1:.4f}")
    return [rows[i : i + k] for i in range(0, n * k, k)]
