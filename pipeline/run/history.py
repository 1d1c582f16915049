"""What happened to a run beyond its steps: settings changed at a resume, and rollbacks; in env.json.

`history` is a list. A change is `{"step", "changed": {name: [before, now]}}`, a rollback `{"update", "to",
"why", "lr_scale"}`: after step `to` the learning rate is `lr_scale` times the schedule's. Both are written
before the run goes on, so a run that is killed and resumed repeats the same steps.
"""

import json
from pathlib import Path
from typing import Any

import tomli_w

from pipeline.errors import UserError
from pipeline.run.files import read_json, read_toml, write_atomic
from pipeline.settings.common import StageSettings, to_dict

MAY_CHANGE = {
    "steps", "checkpoint_every", "save_every", "eval_every", "log_every", "log_samples", "micro_tokens",
    "tracker", "record", "record_every", "max_mismatch_kl", "max_idle_steps", "max_error_share",
    "optim.lr", "optim.clip",
}  # fmt: skip
"""Settings that a resume may change, beside the group `guard`. Those of logs, records, checkpoints and checks
keep the bits, `steps` does with a constant schedule, `micro_tokens` to rounding; the others are for another
run from there on. All else decided what the steps before the checkpoint did."""


def resolved(config: StageSettings) -> dict[str, Any]:
    """The settings that decide the result: all but `resume` and `runs`."""
    return {k: v for k, v in to_dict(config).items() if k not in ("resume", "runs")}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys, as on the command line."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def changes(path: Path, config: StageSettings) -> dict[str, list[Any]]:
    """Settings by name that differ from those of the run in `path`: before and now.
    Raises `UserError`: one that a resume may not change, or fewer steps than are done."""
    before, now = flat(read_toml(path / "config.toml")), flat(resolved(config))
    found = {}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            if key not in MAY_CHANGE and not key.startswith("guard."):
                advice = "resume it with the same settings, or take another --name"
                if key not in before or key not in now:
                    advice = f"{advice}; if its code had other settings, go on with that (commit in env.json)"
                values = f"{before.get(key)!r}, not {now.get(key)!r}"
                raise UserError(f"{path} was begun with {key} = {values}; {advice}")
            found[key] = [before.get(key), now.get(key)]
    return found


def record_changes(path: Path, config: StageSettings, changed: dict[str, list[Any]], step: int) -> str:
    """Note `changed` as of step `step`, and make config.toml that of now; what to say of it."""
    steps = changed.get("steps", [0, step])[1]
    if steps < step:
        raise UserError(f"{path} has done {step} steps; --steps {steps} must be at least that")
    entry = {"step": step, "changed": changed}
    if entry not in read_json(path / "env.json").get("history", [])[-1:]:  # noted before a kill
        note(path, entry)
    write_atomic(path / "config.toml", tomli_w.dumps(resolved(config)))
    return ", ".join(f"{key} is {now}, was {before}" for key, (before, now) in changed.items())


def note(path: Path, entry: dict[str, Any]) -> None:
    """Append an entry to the history."""
    env = read_json(path / "env.json")
    env["history"] = [*env.get("history", []), entry]
    write_atomic(path / "env.json", json.dumps(env, indent=2) + "\n")


def rollbacks(path: Path) -> list[dict[str, Any]]:
    """The rollbacks since the learning rate was last changed by hand, oldest first."""
    found: list[dict[str, Any]] = []
    for entry in read_json(path / "env.json").get("history", []):
        if any(name.endswith("optim.lr") for name in entry.get("changed", ())):
            found = []
        found += [entry] if "lr_scale" in entry else []
    return found
