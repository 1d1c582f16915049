"""Rollouts to examine: our run of an RL stage, or a dump: ours, TRL's (`log_completions`: a parquet table a
step) or verl's (`rollout_data_dir`: a JSONL file a step)."""

import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.jsonl import FORMATS, BadRow, Located, located, object_of, read_log
from pipeline.errors import UserError
from pipeline.run.checkpoint import steps_in
from pipeline.run.files import read_toml
from pipeline.tools.record import load_record

Floats = NDArray[np.float64]
MOST_TOKENS = 20_000_000
"""Tokens (without ids: characters) held at once; of a larger dump half the groups are dropped, and again."""
KEYS = {
    "prompt": ("prompt", "input", "question", "messages"),
    "prompt_ids": ("prompt_ids", "prompt_token_ids", "input_ids"),
    "text": ("completion", "output", "response", "text"),
    "ids": ("completion_ids", "response_ids", "completion_token_ids", "output_ids", "token_ids"),
    "engine": ("logprobs", "rollout_logprobs", "rollout_log_probs", "sampling_per_token_logps"),
    "trainer": ("old_logprobs", "old_log_probs", "old_per_token_logps", "trainer_logprobs"),
    "reward": ("reward", "score"),
    "group": ("group", "group_id", "uid", "id"),
    "step": ("step", "global_step"),
    "finish": ("finish_reason", "stop_reason"),
}
"""Ours first, then TRL's and verl's."""
OTHERS = ("advantage", "advantages", "gts", "solution", "index", "sample", "tokens", "loss", "micro_batch",
          "micro_batches", "weight", "entropy", "seed", "kl", "policy_version", "length")  # fmt: skip
"""Keys that are no rewards."""
KNOWN = {name for names in KEYS.values() for name in names} | set(OTHERS)


@dataclass(frozen=True, slots=True)
class Line:
    """One rollout; what its line does not have is None or empty."""

    step: float
    group: str
    prompt: str
    prompt_ids: tuple[int, ...]
    text: str | None
    ids: tuple[int, ...]
    engine: Floats | None
    trainer: Floats | None
    reward: float | None
    parts: Mapping[str, float]
    cut: bool | None
    """Ended by its limit."""
    failed: bool
    """Its verifier failed, by a key that says so."""
    more: Mapping[str, float]
    """Of `OTHERS`."""

    @property
    def length(self) -> int:
        """Tokens, or characters where the line has no ids."""
        return len(self.ids) or int(self.more.get("tokens", len(self.text or "")))

    @property
    def words(self) -> object:
        """What makes two completions the same."""
        return self.ids or self.text


@dataclass(slots=True)
class Dump:
    """What was read."""

    rows: list[Line] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Of our runs, a row a step."""
    bad: Counter[str] = field(default_factory=Counter)
    """Lines that could not be used, by reason and first place."""
    stale: bool = False
    """Of a run whose rollouts are older than the policy on purpose."""
    turns: bool = False
    """Of a run with an environment, which ends completions anywhere and goes on behind end tokens."""
    keep: int = 1
    """One in this number of groups was kept."""

    @property
    def steps(self) -> list[float]:
        """In order."""
        return sorted({row.step for row in self.rows})

    def groups(self) -> list[list[Line]]:
        """Rows by group, those with two or more; of a run's transcripts, a part of each group, none."""
        found: dict[str, list[Line]] = {}
        for row in (row for row in self.rows if row.ids or not self.metrics):
            found.setdefault(row.group, []).append(row)
        return [rows for rows in found.values() if len(rows) > 1]


def read(path: Path) -> Dump:
    """All that is at `path`. Raises `UserError`: nothing there can be used."""
    dump, first, lines = Dump(), dict[str, str](), list[Located]()
    if (path / "metrics.jsonl").is_file() and (path / "config.toml").is_file():
        dump.metrics = [row for row in read_log(path / "metrics.jsonl") if "step" in row]
        saved = read_toml(path / "config.toml")
        dump.stale = bool(saved.get("staleness") or saved.get("overlap"))  # the latter in earlier versions
        dump.turns = bool(saved.get("environment"))
        files = [path / "samples.jsonl"] if (path / "samples.jsonl").is_file() else []
        lines = [*recorded(path)]
    elif path.is_dir():
        files = sorted((p for p in path.iterdir() if p.name.endswith(FORMATS)), key=_natural)
        if not files:
            stages = ", ".join(sorted(p.parent.name for p in path.glob("*/metrics.jsonl")))
            hint = f"name one of its stages: {stages}" if stages else f"no file ends in {', '.join(FORMATS)}"
            raise UserError(f"{path} is a folder without rollouts; {hint}")
    else:
        files = [path]
    held = 0
    for place, line in itertools.chain(lines, *map(located, files)):
        try:
            row = to_line(line)
        except BadRow as error:
            why = str(error).partition(" (")[0]
            dump.bad[why] += 1
            first.setdefault(why, place)
            continue
        if _dropped(row.group, dump.keep):
            continue
        dump.rows.append(row)
        held += row.length + len(row.prompt)
        if held > MOST_TOKENS:
            dump.keep *= 2
            dump.rows = [kept for kept in dump.rows if not _dropped(kept.group, dump.keep)]
            held = sum(kept.length + len(kept.prompt) for kept in dump.rows)
    dump.bad = Counter({f"{why} (first: {first[why]})": n for why, n in dump.bad.items()})
    if not dump.rows and not dump.metrics:
        reasons = "; ".join(f"{n} x {why}" for why, n in dump.bad.most_common(2)) or "it is empty"
        raise UserError(f"{path} has no rollout that can be read ({reasons}); the keys: {', '.join(KEYS)}")
    return dump


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _dropped(group: str, keep: int) -> bool:
    return zlib.crc32(group.encode(errors="backslashreplace")) % keep != 0


def recorded(run: Path) -> Iterator[Located]:
    """The rollouts of the recorded steps of a run, complete groups, as lines of a dump.
    Raises `UserError`: a record is damaged."""
    for step in steps_in(run, "recorded"):
        folder, _, state = load_record(run, step)
        for graded in state["round"]["graded"]:
            rollout = graded["rollout"]
            names = {"group": f"recorded {rollout['index']}", "completion_ids": rollout["token_ids"].tolist()}
            names |= {
                "logprobs": rollout["logprobs"].tolist(),
                "prompt_ids": [*rollout["prompt"]["token_ids"]],
            }
            same = {key: graded[key] for key in ("parts", "reward", "verdict", "text")}
            question = rollout["prompt"]["problem"]["question"]
            more = {"step": step, "finish_reason": rollout["finish_reason"], "prompt": question}
            yield f"{folder.name}", names | same | more


def to_line(line: Any) -> Line:
    """A line of any of the shapes. Raises `BadRow`: no object, or it has no completion."""
    row = object_of(line)
    of = {key: next((row[n] for n in names if row.get(n) is not None), None) for key, names in KEYS.items()}
    text, ids = _text(of["text"]), _ids(of["ids"])
    if text is None and not ids:
        raise BadRow(f"no completion, under any of {', '.join((*KEYS['text'], *KEYS['ids']))}")
    prompt, prompt_ids, step = _text(of["prompt"]) or "", _ids(of["prompt_ids"]), _number(of["step"]) or 0.0
    named = row["parts"] if isinstance(row.get("parts"), dict) else row
    parts = {k: v for k, x in named.items() if k not in KNOWN and (v := _number(x)) is not None}
    reward = _number(of["reward"])
    if reward is None and parts and "advantage" in row:  # TRL: a column a reward
        reward = sum(parts.values())
    asked = of["group"] if of["group"] is not None else prompt_ids or prompt
    finish, cuts = of["finish"], [row[n] for n in ("truncated", "is_truncated") if n in row]
    return Line(
        step, f"{step} {asked}", prompt, prompt_ids, text, ids, _floats(of["engine"]), _floats(of["trainer"]),
        reward, parts, finish == "length" if finish is not None else bool(cuts[0]) if cuts else None,
        row.get("verdict") == "error" or any(row.get(n) for n in ("error", "verifier_error", "timeout")),
        {name: value for name in OTHERS if (value := _number(row.get(name))) is not None},
    )  # fmt: skip


def _text(value: Any) -> str | None:
    """Text, or the contents of messages, as TRL's tables have them."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, dict) for turn in value):
        return "\n".join(str(turn.get("content") or "") for turn in value)
    return value if isinstance(value, str) else None


def _ids(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and all(type(i) is int for i in value)
    return tuple(value) if whole else ()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (bool, int, float)) and math.isfinite(value) else None


def _floats(value: Any) -> Floats | None:
    """Log-probabilities; None where they are not a list of numbers. NaN stays, for the reader to count."""
    try:
        found = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found.ndim == 1 and len(found) else None


def both_sides(dump: Dump) -> Iterator[tuple[Line, Floats, Floats]]:
    """Rows with log-probabilities of both sides, without the tokens where one is not finite; those whose
    numbers do not fit are counted in `bad`."""
    for row in dump.rows:
        if row.engine is None or row.trainer is None:
            continue
        if len(row.engine) != len(row.trainer):
            dump.bad["log-probabilities of engine and trainer differ in number"] += 1
            continue
        fine = np.isfinite(row.engine) & np.isfinite(row.trainer)
        if not fine.all():
            dump.bad["some log-probabilities are not finite; these tokens are left out"] += 1
        if fine.any():
            yield row, np.minimum(row.engine[fine], 0), np.minimum(row.trainer[fine], 0)
