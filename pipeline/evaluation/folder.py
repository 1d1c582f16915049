"""An evaluation's folder: it grows while the model is sampled, and survives a kill at any moment.

    inputs.json         written first: all that the completions depend on, and what they were made with
    generations.jsonl   one completion a line, in order, as they are graded
    scores.json         written last

The same command goes on where an earlier one ended, to the same bytes; a folder of another evaluation is
refused, with the input that differs.
"""

import errno
import fcntl
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.jsonl import JsonObject, json_line, value_of
from pipeline.errors import UserError
from pipeline.evaluation.parts import by_label, contamination
from pipeline.evaluation.scores import scores
from pipeline.run.files import read_json, remove, write_atomic
from pipeline.run.metrics import say

FRESH = {"generations.jsonl", "inputs.json.partial"}
"""What a run that was killed at its very beginning leaves."""


class Folder:
    """The folder of one evaluation, `path`; one that replaces another grows beside it, as `.next`."""

    def __init__(self, out: Path, inputs: JsonObject, replace_changed: bool = False) -> None:
        """`inputs` is all that the completions depend on, by name; `replace_changed` takes the place of an
        evaluation with others, once this one is complete.
        Raises `UserError`: `out` holds something else, or an evaluation that differs (the input is named)."""
        self.out, self.path, self.inputs, self.count = out, out, inputs, 0
        self.total = inputs["problems"] * inputs["samples"]
        before = read_record(out)
        changed = "" if before is None else difference(inputs, before)
        if changed and not replace_changed:
            raise UserError(f"{out} holds an evaluation with {changed}")
        if changed or (replace_changed and before is None):
            ahead = out.with_name(out.name + ".next")
            if (begun := read_record(ahead)) is not None and difference(inputs, begun):
                remove(ahead)
            self.path = ahead if changed or ahead.exists() else out

    @property
    def rows(self) -> Path:
        """generations.jsonl."""
        return self.path / "generations.jsonl"

    def earlier(self) -> JsonObject:
        """The scores, where they are complete, else {}."""
        found = read_json(self.path / "scores.json") if self.path == self.out else {}
        return found if {"pass@1", "interval", "n", "template"} <= found.keys() else {}

    @contextmanager
    def growing(self, templates: dict[str, str], made_with: JsonObject) -> Iterator[None]:
        """Within it completions may be appended, by this process alone. A Ctrl-C says what is kept.
        Raises `UserError`: the disk is full, which says it too, another process works here, or prompts are
        made otherwise than those before."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.rows.open("ab", buffering=0) as self.file:
                try:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    way = "wait for it, or take another --out"
                    raise UserError(f"another process is working in {self.path}; {way}") from None
                self.record(templates, made_with)
                yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"the disk is full: {self.kept()}; free some space first") from error
        except KeyboardInterrupt as stop:
            raise stop if stop.args else KeyboardInterrupt(self.kept()) from None

    def kept(self) -> str:
        """What a run that ends now leaves."""
        return f"{self.count} of {self.total} completions are kept in {self.path}; the same command goes on"

    def record(self, templates: dict[str, str], made_with: JsonObject) -> None:
        """Write inputs.json, or compare: other prompts are refused, another machine or version is added."""
        before = read_json(self.path / "inputs.json")
        listed = before.get("made_with")
        made = listed if isinstance(listed, list) and all(isinstance(m, dict) for m in listed) else []
        if before and before.get("templates") != templates:
            which = f"template_hash {before.get('templates')}, not {templates}: the templates changed since"
            raise UserError(f"{self.path} has prompts of {which}; restore them, or take another --out")
        if made_with not in made:
            if made:
                differ = ", ".join(key for key, value in made_with.items() if made[-1].get(key) != value)
                say(f"{self.path}: going on with another {differ} than before, which is recorded")
            record = {"inputs": self.inputs, "templates": templates, "made_with": [*made, made_with]}
            write_atomic(self.path / "inputs.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def resume(self, ends: Sequence[int]) -> int:
        """How many parts are complete, of parts that end after `ends` rows each. What follows them, such as a
        torn line, is cut off."""
        sizes = [0]
        with self.rows.open("rb") as lines:
            for number, line in enumerate(lines):
                row = value_of(line) if line.endswith(b"\n") and number < self.total else None
                place = divmod(number, self.inputs["samples"])
                if not isinstance(row, dict) or (row.get("index"), row.get("sample")) != place:
                    break
                sizes.append(sizes[-1] + len(line))
        done = bisect_right(ends, len(sizes) - 1)
        self.count = ends[done - 1] if done else 0
        self.file.truncate(sizes[self.count])
        if self.count:
            say(f"{self.path}: going on after {self.count} of {self.total} completions")
        return done

    def append(self, rows: Sequence[JsonObject]) -> None:
        """Add rows, all or none, to the disk."""
        size = os.fstat(self.file.fileno()).st_size
        data = memoryview("".join(map(json_line, rows)).encode(errors="backslashreplace"))
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file.fileno())
        except OSError:
            with suppress(OSError):
                self.file.truncate(size)
            raise
        self.count += len(rows)

    def finish(self, rows: Sequence[JsonObject], copies: JsonObject) -> JsonObject:
        """Write scores.json, from all rows; the folder then stands at its own name."""
        result = write_scores(self.path, rows, read_json(self.path / "inputs.json"), copies)
        if self.path != self.out:
            old = self.out.with_name(self.out.name + ".old")
            remove(old)
            if self.out.exists():
                self.out.rename(old)
            self.path.rename(self.out)
            remove(old)
        return result


def write_scores(
    path: Path, rows: Sequence[JsonObject], record: JsonObject, copies: JsonObject
) -> JsonObject:
    """scores.json of a folder, from its rows, its inputs.json `record` and `copies_in` of the corpus.
    Raises `ValueError`: as `scores`."""
    inputs, templates = record["inputs"], record["templates"]
    result = {
        **scores(rows),
        **by_label(rows),
        **contamination(rows, copies),
        "template": "+".join(templates),
        "template_hash": "+".join(templates.values()),
        "model_hash": inputs["model_sha256"],
        "sampling": {key: inputs[key] for key in ("temperature", "top_p", "max_tokens", "seed")},
        **record,
    }
    write_atomic(path / "scores.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def read_record(folder: Path) -> JsonObject | None:
    """The inputs of the evaluation in a folder, None where there is nothing yet.
    Raises `UserError`: it is no folder of ours, or damaged."""
    if not folder.exists():
        return None
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    record = read_json(folder / ("inputs.json" if "inputs.json" in names else "scores.json"))
    if "graded_again" in record:
        raise UserError(f"{folder} holds completions graded again, not an evaluation; take another --out")
    if isinstance(inputs := record.get("inputs"), dict):
        return inputs
    begun = folder / "generations.jsonl"
    if names - FRESH or (begun.exists() and begun.stat().st_size):
        raise UserError(f"{folder} exists and holds no evaluation of ours; take another --out")
    return None


def difference(inputs: JsonObject, before: JsonObject) -> str:
    """The first input that differs from those before, and what to do; "" for none. Where the model lies does
    not matter, only what it is."""
    for key, value in inputs.items():
        was = before.get(key)
        if key == "model" or was == value:
            continue
        if key == "samples" and isinstance(was, int) and was < value:
            return f"{was} samples a problem, from which there is no avg@{value}; take another --out"
        names = {"model_sha256": "the model", "problems_sha256": f"the problems of {inputs['benchmark']}"}
        why = f": {names[key]} changed since; restore them, or" if key in names else ";"
        return f"{key} {was!r}, not {value!r}{why} take another --out"
    return ""
