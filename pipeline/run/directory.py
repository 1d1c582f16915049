"""The run directory: `runs/NAME/STAGE/` is the complete record of a stage, and survives a kill at any moment.

    config.toml      resolved settings             metrics.jsonl    one line a step
    env.json         versions, commit, inputs      samples.jsonl    complete transcripts with reward parts
    checkpoint-N/    state; manifest written last  latest           name of the newest checkpoint
    model/           the finished model            done.json        written last: the stage is complete

A directory in use is never overwritten. `--resume` goes on from `latest`, to the same bits.
"""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
import signal
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from pipeline.data.jsonl import json_line
from pipeline.errors import UserError
from pipeline.run.checkpoint import newest_checkpoint, save_checkpoint
from pipeline.run.environment import environment, peak_rss_bytes
from pipeline.run.files import replacing, sha256, write_atomic
from pipeline.run.metrics import MetricsLog, say, truncate_after
from pipeline.settings.common import StageSettings, to_dict
from pipeline.table import STAGES, Stage


class RunDir:
    """One stage's directory. Made by `open_run`."""

    def __init__(self, stage: Stage, config: StageSettings, command: str) -> None:
        self.stage, self.config, self.command = stage, config, command
        self.path = config.runs / config.name / stage.name
        self.interrupted = False  # set by Ctrl-C; loops look at it after every step
        self.metrics: MetricsLog

    # ---- inputs

    def model_input(self, value: str | Path) -> Path:
        """The model directory that `value` names: a stage of this run (`sft`) or a path; recorded by hash."""
        path, hint = self.find_input(value, "model", "a model directory")
        if not (path / "config.json").is_file():
            raise UserError(f"no model at {path}; {hint}")
        self.record_input(path)
        return path

    def file_input(self, value: str | Path, filename: str) -> Path:
        """The file `filename` of a stage of this run (`reject`), or the file at a path; recorded by hash."""
        path, hint = self.find_input(value, filename, "a file")
        if not path.is_file():
            raise UserError(f"no file {path}; {hint}")
        self.record_input(path)
        return path

    def find_input(self, value: str | Path, part: str, what: str) -> tuple[Path, str]:
        """Path of `value`, `part` of a stage of this run or itself a path, and the hint if it is missing."""
        if str(value) in {stage.name for stage in STAGES}:
            hint = f"make it first: make {value} ARGS='--name {self.config.name}'"
            return self.path.parent / str(value) / part, hint
        return Path(value), f"name a stage of this run or {what}"

    def record_input(self, path: Path) -> None:
        """Note the sha256 of an input in env.json."""
        env = json.loads((self.path / "env.json").read_text())
        env["inputs"][str(path)] = sha256(path)
        write_atomic(self.path / "env.json", json.dumps(env, indent=2) + "\n")

    # ---- outputs

    def log(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """One step's metrics: to metrics.jsonl and, in one line, to the console."""
        self.metrics.log(step, total, metrics)

    def samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Append complete transcripts of step `step`."""
        with (self.path / "samples.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json_line({"step": step, **r}) for r in records)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill `checkpoint-STEP/`; it counts from the moment that `latest` names it."""
        save_checkpoint(self.path, step, write)

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint, checked against its manifest."""
        return newest_checkpoint(self.path)

    def save_model(self, write: Callable[[Path], None]) -> Path:
        """Let `write` fill `model/`, the finished model; it appears complete or not at all."""
        with replacing(self.path / "model") as partial:
            partial.mkdir()
            write(partial)
        return self.path / "model"

    def seconds_and_peak(self) -> tuple[float, int]:
        """Seconds and peak bytes in done.json; zeros before the stage was first finished."""
        try:
            usage = json.loads((self.path / "done.json").read_text())
        except FileNotFoundError:
            return 0.0, 0
        return usage["seconds"], usage["peak_rss_bytes"]

    def stop_if_interrupted(self, save: Callable[[], None] | None = None) -> None:
        """After a Ctrl-C: save, then leave with exit code 130. Called between steps."""
        if self.interrupted:
            if save:
                save()
            raise KeyboardInterrupt(f"everything is saved; go on with: {self.command} --resume")

    def on_sigint(self, signum: int, frame: FrameType | None) -> None:
        """First Ctrl-C: finish the step and save. Second: stop now."""
        if self.interrupted:
            raise KeyboardInterrupt(f"stopped at once; go on with: {self.command} --resume")
        self.interrupted = True
        say("\nCtrl-C: finishing this step, then saving (again to stop now)")

    def on_sigusr1(self, signum: int, frame: FrameType | None) -> None:
        """Like a first Ctrl-C, however often it comes: `up` and batch systems send it."""
        if not self.interrupted:
            self.on_sigint(signum, frame)


def resolved(config: StageSettings) -> dict[str, Any]:
    """The settings that decide the result: all but `resume` and `runs`."""
    return {k: v for k, v in to_dict(config).items() if k not in ("resume", "runs")}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys, as on the command line."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def check_same_config(path: Path, config: StageSettings) -> None:
    """Raise `UserError` when the directory was begun with other settings."""
    before, now = flat(tomllib.loads((path / "config.toml").read_text())), flat(resolved(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{path} was begun with {key} = {before.get(key)!r}, not {now.get(key)!r}; "
                "resume it with the same settings, or take another --name"
            )


@contextmanager
def open_run(stage: Stage, config: StageSettings, command: str) -> Iterator[RunDir | None]:
    """Make, or with `resume` reopen, the stage's directory; write done.json when the body ends well.

    A stage that `extends` may reopen it at any time, with other settings too; its seconds add up.
    Yields None when there is nothing left to do. Raises `UserError` when the directory is in use.
    `command` is what the user typed, less `--resume`, for the errors that say how to go on.
    """
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise UserError(f"--name {config.name!r} must be letters, digits and . _ - (it becomes a folder)")
    run = RunDir(stage, config, command)
    used = (run.path / "config.toml").exists() and not stage.extends
    done = (run.path / "done.json").exists() and not stage.extends
    if used and not config.resume:
        raise UserError(
            f"{run.path} is {'finished' if done else 'in use'}; "
            + (f"to redo it: rm -r {run.path}" if done else f"go on with: {command} --resume")
            + ", or take another --name"
        )
    if used:
        check_same_config(run.path, config)
    if done:
        say(f"{stage.name}: {run.path} is already finished")
        yield None
        return
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with locked(run.path):
            begin(run, resume=used)
            before = signal.signal(signal.SIGINT, run.on_sigint)
            usr1 = signal.signal(signal.SIGUSR1, run.on_sigusr1)
            try:
                yield run
                finish(run)
            except UserError:
                forget_if_empty(run, used)
                raise
            finally:
                signal.signal(signal.SIGINT, before)
                signal.signal(signal.SIGUSR1, usr1)
                run.metrics.close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full ({run.path}); free some space, then: {command} --resume"
            ) from error
        raise


def forget_if_empty(run: RunDir, used: bool) -> None:
    """Remove a new directory in which nothing was done: the corrected command must not find it in use."""
    work = [
        p for p in run.path.iterdir() if p.name not in ("config.toml", "env.json", "lock", "metrics.jsonl")
    ]
    if not used and not work and not (run.path / "metrics.jsonl").stat().st_size:
        shutil.rmtree(run.path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory's lock; the system drops it when the process dies."""
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is working in {path}; wait for it, or take another --name"
            ) from None
        yield


def begin(run: RunDir, resume: bool) -> None:
    """Describe a new run, or cut a resumed one's logs back to its checkpoint."""
    newest = run.latest() if resume else None
    step = newest[0] if newest else 0
    if resume:
        truncate_after(run.path / "samples.jsonl", step)
        say(f"{run.stage.name}: going on after step {step} of {run.path}")
    else:
        write_atomic(run.path / "env.json", json.dumps(environment(), indent=2) + "\n")
        write_atomic(run.path / "config.toml", tomli_w.dumps(resolved(run.config)))
    run.metrics = MetricsLog(run.path / "metrics.jsonl", run.stage.name, keep_to=step if resume else None)
    run.metrics.elapsed_before += run.seconds_and_peak()[0]


def finish(run: RunDir) -> None:
    """Write done.json, last of all."""
    peak = max(peak_rss_bytes(), run.seconds_and_peak()[1])
    usage = {"seconds": round(run.metrics.elapsed_s, 2), "peak_rss_bytes": peak, "seed": run.config.seed}
    write_atomic(run.path / "done.json", json.dumps(usage) + "\n")
