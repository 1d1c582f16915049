"""Rows of any known shape as problems; bad rows are left out and counted, up to a bound."""

import ast
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast, get_args

from pipeline.data.jsonl import BadRow, JsonObject, Located, object_of
from pipeline.data.shapes import CASES, SHAPES, Asked, Tests, first, json_of, read_answer, read_cases
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings
from rollout.types import Kind, Language, Problem

T = TypeVar("T")
FEW = 3
"""Bad rows that any share allows, in files of twice as many rows or more; and how many a message names."""
LANGUAGES = {"english": "en", "chinese": "zh", "eng": "en", "zho": "zh", "zh-cn": "zh"}
LABELS = {
    "subject": ("subfield", "subject", "type", "topic", "category"),
    "level": ("level", "difficulty"),
    "family": ("family", "original_id"),
}
"""Keys of MATH (type, level), OlympiadBench (subfield, difficulty), MMLU-Pro, GSM-Symbolic (original_id)."""
ALL_ROWS = RowSettings()


def plain(row: Any, fields: dict[str, str]) -> JsonObject:
    """A row without nesting, its keys in lower case, with the names that `fields` gives to its values.
    Raises `BadRow`: it is no object, or has no such key."""
    if isinstance(row, dict) and {"0", "1"} <= row.keys():  # Open-Reasoner-Zero on the hub: a pair of turns
        row = [row["0"], row["1"]]
    if isinstance(row, list) and len(row) > 1 and all(isinstance(turn, dict) for turn in row):
        truth = row[1].get("ground_truth")
        row = {"messages": row[:1], "ground_truth": truth.get("value") if isinstance(truth, dict) else truth}
    row = object_of(row)
    out = {str(key).lower(): value for key, value in row.items()}
    for key in ("question", "reward_model", "verification_info"):  # PRM800K, verl, SYNTHETIC-1
        inner = out.get(key) if key == "question" else json_of(out.get(key))
        if isinstance(inner, dict):
            out = {name: value for name, value in out.items() if name != key} | inner
    return out | {name: value_at(row, path) for name, path in fields.items()}


def value_at(row: JsonObject, path: str) -> Any:
    """The value of a key, or of `key.inner` within an object or a text of JSON."""
    value: Any = row
    for key in [path] if path in row else path.split("."):
        value = json_of(value)
        if not isinstance(value, dict) or key not in value:
            raise BadRow(f"no key {path}, which --fields names; it has: {', '.join(map(str, row))[:80]}")
        value = value[key]
    return value


def checked(row: JsonObject, fields: dict[str, str]) -> Asked:
    """What a plain row asks and what checks it, by what `fields` names, else by its shape."""
    if {"answer", "solution"} & fields.keys():
        return read_answer({key: row[key] for key in row if key != "ground_truth"})
    if "tests" in fields:
        return read_cases({key: row[key] for key in row if key == "tests" or (key,) not in CASES})
    read = next(shape[0] for key, shape in SHAPES.items() if not key or first(row, key))
    if row.get("kind") == "code" and read is read_answer:
        raise BadRow("a code problem without tests")
    return read(row)


def to_problem(row: Any, source: str, index: int, fields: dict[str, str]) -> Problem:
    """A row of any known shape as a problem. Without an id, `source` and `index` make one.
    Raises `BadRow`: no question, neither answer nor tests, or text that is not valid Unicode."""
    row = plain(row, fields)
    asked = checked(row, fields)
    name = first(row, "id", "unique_id", "task_id", "question_id", "problem_id", "uuid")
    identity = name if isinstance(name, str) else f"{source}/{index if name is None else name}"
    kind, spoken = str(row.get("kind") or "math"), str(row.get("language") or "en").lower()
    language = "en" if asked.tests and spoken.startswith("py") else LANGUAGES.get(spoken, spoken)
    kind = "code" if asked.tests and kind in get_args(Kind) else kind
    for key, value, known in (("kind", kind, get_args(Kind)), ("language", language, get_args(Language))):
        if value not in known:
            raise BadRow(f"{key} {value!r} must be one of {', '.join(known)}")
    named = first(row, "source", "data_source")
    origin = named if isinstance(named, str) else source
    labels = labels_of(row, fields)
    check_text(identity, asked.question, asked.answer, origin, *labels.values(), *map(str, asked.tests))
    check_python(asked.tests)
    of, spoken = cast(Kind, kind), cast(Language, language)
    told = asked.question, asked.answer, asked.tests, origin, spoken, asked.shown
    return Problem(identity, of, *told, labels)


def labels_of(row: JsonObject, fields: dict[str, str]) -> dict[str, str]:
    """Subject, level and family of a plain row, by what `fields` names or public sets call them; those that
    are text or a number."""
    found = {name: row[name] if name in fields else first(row, *keys) for name, keys in LABELS.items()}
    known = {name: v for name, v in found.items() if type(v) in (str, int, float) and v == v}  # no NaN
    said = {name: f"{v:g}" if isinstance(v, float) else str(v).strip() for name, v in known.items()}
    return {name: value.removeprefix("Level ") for name, value in said.items() if value}


def check_python(tests: Tests) -> None:
    """Raise `BadRow` where a statement among `tests` is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\\d" in a string
        for test in tests:
            try:
                ast.parse(test if isinstance(test, str) else "")
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise BadRow(f"a test is no Python: {error}") from error


def check_text(*texts: str) -> None:
    """Raise `BadRow` where one of `texts` is no text that UTF-8 can hold."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadRow("a lone surrogate, which is no character") from error


class Tally:
    """The rows of a source that cannot be used, against the bound `max_bad_rows`."""

    def __init__(self, source: str, settings: RowSettings) -> None:
        self.source, self.most = source, settings.max_bad_rows
        self.total, self.count, self.named = 0, 0, dict[str, list[str]]()

    def bad(self, where: str, why: str) -> None:
        """Count a bad row."""
        self.count += 1
        if self.count <= FEW:
            self.named.setdefault(why, []).append(where)

    def usable(self, rows: Iterable[Located], convert: Callable[[Any, int], T]) -> Iterator[tuple[str, T]]:
        """Each row's place and what `convert` makes of row and index; `BadRow`s are counted."""
        for where, row in rows:
            self.total += 1
            try:
                yield where, convert(row, self.total - 1)
            except BadRow as error:
                self.bad(where, str(error))
            except (TypeError, AttributeError, LookupError, ValueError) as error:  # rows are any JSON
                self.bad(where, f"a value of a kind that no known shape has ({error})")

    def settle(self) -> None:
        """Say how many rows were left out. Raises `UserError`: they are all rows, or more than the bound."""
        named = [f"{', '.join(places)}: {why}" for why, places in self.named.items()]
        few = min(FEW, self.total // 2) if self.most else 0
        most = self.most if self.most >= 1 else max(self.most * self.total, few)
        if self.count and self.count > min(most, self.total - 1):
            more = f" ({self.count} bad rows of {self.total})" if self.count > 1 else ""
            advice = f"; --max-bad-rows {self.count} leaves them out" if self.count < self.total else ""
            advice = advice or "; --fields names keys that are called otherwise" * (": no " in named[0])
            raise UserError("; ".join(named) + more + advice)
        if self.count:
            print(f"{self.source}: left out {self.count} of {self.total} rows; the first: {named[0]}")
