"""Rows of any known shape as problems; bad rows are left out and counted, up to a bound."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

from pipeline.data.jsonl import BadRow, JsonObject, Located
from pipeline.data.shapes import CASES, SHAPES, Asked, decoded, first, read_cases, read_gold
from pipeline.errors import UserError
from pipeline.settings.common import RowSettings
from rollout.types import Kind, Language, Problem

T = TypeVar("T")
FEW = 3
"""Bad rows that any share allows, in files of twice as many rows or more."""
NAMED = 3
"""Bad rows that a message names."""
KINDS = ("math", "general", "code")
LANGUAGES: dict[str, Language] = {"english": "en", "chinese": "zh", "eng": "en", "zho": "zh", "zh-cn": "zh"}
ALL_ROWS = RowSettings()


def normalised(row: Any, fields: dict[str, str]) -> JsonObject:
    """A row with its keys in lower case, and with the names that `fields` gives to others of its values.

    Raises:
        BadRow: it is no object, or has no such key.
    """
    if isinstance(row, dict) and {"0", "1"} <= row.keys():  # Open-Reasoner-Zero on the hub: a pair of turns
        row = [row["0"], row["1"]]
    if isinstance(row, list) and len(row) > 1 and all(isinstance(turn, dict) for turn in row):
        truth = row[1].get("ground_truth")
        row = {"messages": row[:1], "ground_truth": truth.get("value") if isinstance(truth, dict) else truth}
    if not isinstance(row, dict):
        raise BadRow(f"expected a JSON object, found {type(row).__name__}")
    plain = {str(key).lower(): value for key, value in row.items()}
    if isinstance(inner := plain.get("question"), dict):  # PRM800K
        plain = {key: value for key, value in plain.items() if key != "question"} | inner
    return plain | {name: value_at(row, path) for name, path in fields.items()}


def value_at(row: JsonObject, path: str) -> Any:
    """The value of a key, or of `key.inner` within an object or a text of JSON."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        value = decoded(value)
        if not isinstance(value, dict) or key not in value:
            raise BadRow(f"no key {path}, which --fields names; it has: {', '.join(map(str, row))[:80]}")
        value = value[key]
    return value


def asked(row: JsonObject, fields: dict[str, str]) -> Asked:
    """What a normalised row asks, by what `fields` names, else by the first shape whose keys it has."""
    if "tests" in fields:
        return read_cases({key: value for key, value in row.items() if key not in CASES or key == "tests"})
    if "answer" in fields or "solution" in fields:
        return read_gold(row)
    if row.get("kind") == "code" and not first(row, *CASES, "test_list", "public_test_cases", "public_tests"):
        raise BadRow("a code problem without tests")
    return next(shape for shape in SHAPES if all(first(row, key) for key in shape.keys)).read(row)


def to_problem(row: Any, source: str, index: int, fields: dict[str, str]) -> Problem:
    """A row of any known shape as a problem. Without an id, `source` and `index` make one.

    Raises:
        BadRow: no question, neither answer nor tests, or text that is not valid Unicode.
    """
    row = normalised(row, fields)
    found = asked(row, fields)
    name = first(row, "id", "unique_id", "task_id", "question_id", "problem_id", "uuid")
    identity = name if isinstance(name, str) else f"{source}/{index if name is None else name}"
    kind = choice(row, "kind", KINDS) or "math"
    spoken = str(row.get("language") or "en").lower()
    spoken = "en" if found.tests and spoken.startswith("py") else LANGUAGES.get(spoken, spoken)
    kind, language = "code" if found.tests else kind, choice({"language": spoken}, "language", ("en", "zh"))
    named = first(row, "source", "data_source")
    origin = named if isinstance(named, str) else source
    check_text(identity, found.question, found.answer, origin, *map(str, found.tests))
    kinds = cast(Kind, kind), cast(Language, language)
    return Problem(
        identity, kinds[0], found.question, found.answer, found.tests, origin, kinds[1], found.shown
    )


def choice(row: JsonObject, key: str, allowed: tuple[str, ...]) -> str | None:
    """The row's value of an optional key that has few values."""
    value = row.get(key)
    if value is not None and value not in allowed:
        raise BadRow(f"{key} {value!r} must be one of {', '.join(allowed)}")
    return cast("str | None", value)


def check_text(*texts: str) -> None:
    """Raise `BadRow` where one of `texts` is no text that UTF-8 can hold (a lone surrogate)."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"a lone surrogate ({text[error.start]!r}), which is no character") from error


class Tally:
    """The rows of a source that cannot be used, against the bound `max_bad_rows`."""

    def __init__(self, source: str, settings: RowSettings) -> None:
        self.source, self.settings = source, settings
        self.total, self.count, self.named = 0, 0, list[str]()

    def bad(self, where: str, why: str) -> None:
        """Count a bad row."""
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"{where}: {why}")

    def usable(self, rows: Iterable[Located], convert: Callable[[Any, int], T]) -> Iterator[tuple[str, T]]:
        """Each row's place and what `convert` makes of row and index; `BadRow`s are counted."""
        for where, row in rows:
            self.total += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                yield where, convert(row, self.total - 1)
            except BadRow as error:
                self.bad(where, str(error))

    def settle(self) -> None:
        """Say how many rows were left out.

        Raises:
            UserError: they are all rows, or more than the bound.
        """
        most = self.settings.max_bad_rows
        few = min(FEW, self.total // 2) if 0 < most < 1 else 0
        if self.count and (
            self.count == self.total or self.count > max(few, most * (self.total if most < 1 else 1))
        ):
            more = f" ({self.count} bad rows of {self.total})" if self.count > 1 else ""
            advice = "" if self.count == self.total else f"; --max-bad-rows {self.count} leaves them out"
            raise UserError("; ".join(self.named) + more + advice)
        if self.count:
            print(f"{self.source}: left out {self.count} of {self.total} rows; the first: {self.named[0]}")
