"""The run directory: `runs/NAME/STAGE/` is the complete record of a stage, and survives a kill at any moment.

    config.toml      resolved settings             metrics.jsonl    one line a step
    env.json         versions, commit, inputs      samples.jsonl    complete transcripts with reward parts
    checkpoint-N/    state; manifest written last  latest           name of the newest checkpoint
    recorded-N/      a step, to be replayed        done.json        written last: the stage is complete
    model/           the finished model

A directory in use is never overwritten; a run that ended before its first step is started again. `--resume`
goes on from `latest`, to the same bits.
"""

import errno
import fcntl
import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from model.checkpoint import not_finite
from pipeline.data.hub import hub_model, is_model_name
from pipeline.data.jsonl import json_line
from pipeline.errors import Stopped, UserError
from pipeline.run import ranks
from pipeline.run.checkpoint import go_back, newest_checkpoint, save_checkpoint
from pipeline.run.environment import environment, peak_rss_bytes
from pipeline.run.files import damaged, read_json, remove, replacing, sha256, write_atomic
from pipeline.run.history import changes, flat, note, record_changes, resolved, rollbacks
from pipeline.run.metrics import MetricsLog, say, truncate_after
from pipeline.run.trackers import Tracker
from pipeline.settings.common import ComputeSettings, LoggedSettings, StageSettings
from pipeline.table import STAGES, Stage


class RunDir:
    """One stage's directory. Made by `open_run`."""

    def __init__(self, stage: Stage, config: StageSettings, command: str) -> None:
        self.stage, self.config, self.command = stage, config, command
        self.path = config.runs / config.name / stage.name
        self.interrupted = False  # set by Ctrl-C; loops look at it after every step
        self.went_on = False  # a step, a checkpoint, a rollback or a model was written
        self.metrics: MetricsLog

    # ---- inputs

    def model_input(self, value: str | Path) -> Path:
        """The model directory that `value` names: a stage of this run or a part of one (`sft`,
        `distill/student`), a path, or a model of the hub (`Qwen/Qwen2.5-1.5B`); recorded by hash. A resumed
        run takes the hub's revision that it began with."""
        name = str(value)
        if not is_model_name(name) or stage_in(name):
            return self.file_input(value, "model", "config.json")
        path = hub_model(name, self.environment()["inputs"].get(f"hub:{name}"))
        self.note_input(f"hub:{name}", path.name)
        return path

    def corpus_input(self, value: str) -> Path | str:
        """The corpus that `value` names: that of a stage of this run (`reject`), or a file; recorded by hash.
        A data set of the hub stays its name (`hub:OWNER/NAME:SPLIT`)."""
        return value if value.startswith("hub:") else self.file_input(value, "corpus.jsonl")

    def file_input(self, value: str | Path, part: str, inside: str = "") -> Path:
        """`part` of stage `value` (or STAGE/FOLDER) of this run, or else the path `value`; recorded by hash.
        It is a model directory with the file `inside`, or a file."""
        path, hint = Path(value), f"name a stage of this run or {'a model directory' if inside else 'a file'}"
        if stage := stage_in(str(value)):
            path = self.path.parent / str(value) / part
            runs = "" if self.config.runs == Path("runs") else f" --runs {self.config.runs}"
            hint = f"make it first: make {stage} ARGS='--name {self.config.name}{runs}'"
        if not (path / inside).is_file():
            raise UserError(f"no {'model at' if inside else 'file'} {path}; {hint}")
        self.record_input(path)
        return path

    def record_input(self, path: Path) -> str:
        """Note the sha256 of an input in env.json, and return it."""
        digest = sha256(path)
        self.note_input(str(path), digest)
        return digest

    def record_rows(self, name: str, rows: Iterable[object]) -> None:
        """Note the sha256 of a data set's rows, dataclasses of plain values, as input `name`."""
        digest = hashlib.sha256()
        for row in rows:
            digest.update(f"{row!r}\n".encode(errors="backslashreplace"))
        self.note_input(name, digest.hexdigest())

    def note_input(self, name: str, digest: str) -> None:
        """Note an input and its hash in env.json. Raises `UserError`: the run began with another."""
        if ranks.rank():
            return
        env = self.environment()
        before = env["inputs"].get(name, digest)
        if before != digest and not self.stage.extends:
            raise UserError(f"{name} changed since this run began; restore it, or take another --name")
        self.note("inputs", env["inputs"] | {name: digest})

    def note(self, name: str, value: object) -> None:
        """Note something in env.json, in place of an older note."""
        if not ranks.rank():
            noted = self.environment() | {name: value}
            write_atomic(self.path / "env.json", json.dumps(noted, indent=2) + "\n")

    def environment(self) -> dict[str, Any]:
        """What env.json has; raises `UserError` where it is damaged."""
        env = read_json(self.path / "env.json")
        if not isinstance(env.get("inputs"), dict):
            raise damaged(self.path / "env.json", "no inputs")
        return env

    # ---- outputs

    def log(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """One step's metrics: to metrics.jsonl and, in one line, to the console."""
        self.went_on = True
        if not ranks.rank():
            self.metrics.log(step, total, metrics)

    def samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Append complete transcripts of step `step`."""
        with (self.path / "samples.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json_line({"step": step, **r}) for r in records)

    def checkpoint(self, step: int, write: Callable[[Path], None], applied: int | None = None) -> None:
        """Let `write` fill `checkpoint-STEP/`; see `pipeline.run.checkpoint`."""
        self.went_on = True
        if not ranks.rank():
            save_checkpoint(self.path, step, write, applied)

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint, checked against its manifest."""
        return newest_checkpoint(self.path)

    def roll_back(self, update: int, applied: int, floor: int, why: str, slower: float) -> None:
        """Go back from update `update`, see `go_back`, with `slower` times the learning rate; logs are cut
        back too."""
        self.went_on = True
        ranks.wait()  # until the others have read what is replaced here
        if not ranks.rank():
            to = go_back(self.path, applied, floor)
            scale = ([1.0] + [entry["lr_scale"] for entry in self.rollbacks(floor)])[-1] * slower
            note(self.path, {"update": update, "to": to, "why": why, "lr_scale": scale})
            before = self.metrics
            before.file.close()
            truncate_after(self.path / "samples.jsonl", to)
            self.metrics = MetricsLog(self.path / "metrics.jsonl", self.stage.name, keep_to=to)
            self.metrics.elapsed_before, self.metrics.track = before.elapsed_s, before.track
            say(f"{self.stage.name}: {why}: back to step {to}, learning rate times {scale:g}")
        ranks.wait()

    def rollbacks(self, floor: int = 0) -> list[dict[str, Any]]:
        """See `history.rollbacks`: those to step `floor` or a later one."""
        return [entry for entry in rollbacks(self.path) if entry["to"] >= floor]

    @property
    def era(self) -> int:
        """Rollbacks and changes of settings so far."""
        return len(self.environment().get("history", []))

    def kept(self) -> str:
        """What there is to go on from, for a guard that stops the run."""
        newest = self.latest()
        return f"{newest[1]} is kept" if newest else "There is no checkpoint yet: a resume begins at step 1"

    def save_model(self, write: Callable[[Path], None], folder: str = "model") -> Path:
        """Let `write` fill `folder`, a finished model; it appears complete or not at all.
        Raises `Stopped`: a tensor has a value that is not finite."""
        self.went_on = True
        if ranks.rank():
            return self.path / folder
        with replacing(self.path / folder) as partial:
            partial.mkdir(parents=True)
            write(partial)
            if name := not_finite(partial):
                again = f"{self.kept()}; lower the rate: {self.command} --resume --optim.lr VALUE"
                raise Stopped(f"the finished {folder} is not finite in {name}, so it is not saved. {again}")
        return self.path / folder

    def stop_if_interrupted(self, save: Callable[[], None] | None = None) -> None:
        """After a Ctrl-C: save, then leave with exit code 130. Called between steps."""
        if self.interrupted:
            if save:
                save()
            raise KeyboardInterrupt(f"everything is saved; go on with: {self.command} --resume")

    def on_sigint(self, signum: int, frame: FrameType | None) -> None:
        """First Ctrl-C: finish the step and save. Second: stop now. SIGUSR1, which `up` and batch systems
        send, counts as a first one however often it comes."""
        if self.interrupted and signum == signal.SIGINT and ranks.world() == 1:  # launchers repeat it
            raise KeyboardInterrupt(f"stopped at once; go on with: {self.command} --resume")
        if not self.interrupted:
            self.interrupted = True
            say("\nCtrl-C: finishing this step, then saving (again to stop now)")


@contextmanager
def open_run(stage: Stage, config: StageSettings, command: str) -> Iterator[RunDir | None]:
    """Make, or with `resume` reopen, the stage's directory; write done.json when the body ends well. A stage
    that `extends` may be reopened at any time, with other settings too; its seconds add up. Yields None when
    there is nothing left to do. Raises `UserError` when the directory is in use. `command` is what the user
    typed, less `--resume`, for the errors that say how to go on."""
    if not re.fullmatch(r"\w[\w.-]{0,199}", config.name):
        raise UserError(f"--name {config.name!r} must be letters, digits and . _ -, at most 200 (a folder)")
    run = RunDir(stage, config, command)
    if ranks.world() > 1 and not stage.ranks:
        raise UserError(f"{stage.name} computes in one process; start it without torchrun or accelerate")
    ranks.join(isinstance(config, ComputeSettings) and config.device == "cpu")
    if ranks.rank():
        begun = ranks.largest(0)  # once rank 0 has the directory ready
        with listening(run):
            yield run if begun else None
        return
    chosen = config.tracker if isinstance(config, LoggedSettings) else ""
    tracker = Tracker(chosen, run.path, flat(resolved(config))) if chosen else None
    used = (run.path / "config.toml").exists() and not stage.extends
    done = (run.path / "done.json").exists() and not stage.extends
    if used and not config.resume and (done or has_work(run.path)):
        way = f"finished; to redo it: rm -r {run.path}" if done else f"in use; go on with: {command} --resume"
        raise UserError(f"{run.path} is {way}, or take another --name")
    changed = changes(run.path, config) if used and config.resume else {}
    if done and not changed:
        say(f"{stage.name}: {run.path} is already finished")
        ranks.largest(0)
        yield None
        return
    if done:
        check_extension(run.path, changed)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {run.path}: {error.strerror}; choose another --runs") from error
    try:
        with locked(run.path):
            if used and not config.resume:
                start_again(run)
            before = kept_files(run) if used and config.resume else {}
            begin(run, used and config.resume, changed)
            run.metrics.track = tracker.log if tracker else None
            ranks.largest(1)
            try:
                with listening(run):
                    yield run
                finish(run)
            except UserError:
                if ranks.world() == 1:  # the others may still read there
                    forget_if_empty(run, used)
                if not run.went_on:
                    for path, data in before.items():
                        write_atomic(path, data)
                raise
            finally:
                run.metrics.file.close()
                if tracker:
                    tracker.finish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"free some space, then: {command} --resume"
            raise UserError(f"the disk is full ({run.path}); {advice}") from error
        raise


def check_extension(path: Path, changed: Mapping[str, Any]) -> None:
    """Raise `UserError`: settings have changed since the stage was finished, other than to more steps."""
    if "steps" not in changed:
        raise UserError(f"{path} is finished, with another {min(changed)}; take another --name")
    if changed["steps"][1] < changed["steps"][0]:
        most = f"{changed['steps'][0]} steps; more of them go on"
        raise UserError(f"{path} is finished, with {most}, for fewer take another --name")


def stage_in(value: str) -> str:
    """The stage that `value` names, alone or as STAGE/FOLDER; empty where it names none."""
    stage, _, folder = value.partition("/")
    return stage if "/" not in folder and stage in {stage.name for stage in STAGES} else ""


@contextmanager
def listening(run: RunDir) -> Iterator[None]:
    """Within it, `run` gets the signals."""
    handlers = {s: signal.signal(s, run.on_sigint) for s in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def has_work(path: Path) -> bool:
    """Whether a run left a checkpoint, a model, or a record of a step."""
    logs = (path / name for name in ("metrics.jsonl", "samples.jsonl"))
    made = (path / "latest").exists() or any(path.glob("**/model"))
    return made or any(log.is_file() and log.stat().st_size for log in logs)


def kept_files(run: RunDir) -> dict[Path, str]:
    """What a resume changes before its first step, to be put back where it is then refused."""
    names = ("config.toml", "env.json", "done.json", "metrics.jsonl", "samples.jsonl")
    paths = (run.path / name for name in names)
    return {path: path.read_text(errors="replace") for path in paths if path.is_file()}


def start_again(run: RunDir) -> None:
    """Clear the directory of a run that ended before its first step; its lock is held."""
    for file in [p for p in run.path.iterdir() if p.name != "lock"]:
        remove(file)
    say(f"{run.stage.name}: the run in {run.path} ended before its first step: starting again")


def forget_if_empty(run: RunDir, used: bool) -> None:
    """Remove a new directory in which nothing was done: the corrected command must not find it in use."""
    work = {p.name for p in run.path.iterdir()} - {"config.toml", "env.json", "lock", "metrics.jsonl", "rows"}
    if not used and not work and not (run.path / "metrics.jsonl").stat().st_size:
        shutil.rmtree(run.path)
        with suppress(OSError):  # not empty: another stage's
            run.path.parent.rmdir()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory's lock; the system drops it when the process dies."""
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "wait for it, or take another --name"
            raise UserError(f"another process is working in {path}; {advice}") from None
        yield


def begin(run: RunDir, resume: bool, changed: dict[str, list[Any]]) -> None:
    """Describe a new run; or record what `changed`, and cut a resumed one's logs back to its checkpoint."""
    newest = run.latest() if resume else None
    step = newest[0] if newest else 0
    if resume:
        run.environment()
        what = record_changes(run.path, run.config, changed, step) if changed else ""
        remove(run.path / "done.json")  # of a finished run that gets more steps
        truncate_after(run.path / "samples.jsonl", step)
        say(f"{run.stage.name}: going on after step {step} of {run.path}{what and f': {what}'}")
    else:
        write_atomic(run.path / "env.json", json.dumps(environment(), indent=2) + "\n")
        write_atomic(run.path / "config.toml", tomli_w.dumps(resolved(run.config)))
    run.metrics = MetricsLog(run.path / "metrics.jsonl", run.stage.name, keep_to=step if resume else None)
    run.metrics.elapsed_before += read_json(run.path / "done.json").get("seconds", 0.0)


def finish(run: RunDir) -> None:
    """Write done.json, last of all."""
    peak = max(peak_rss_bytes(), read_json(run.path / "done.json").get("peak_rss_bytes", 0))
    usage = {"seconds": round(run.metrics.elapsed_s, 2), "peak_rss_bytes": peak, "seed": run.config.seed}
    usage |= {"ended": round(time.time(), 2)}
    write_atomic(run.path / "done.json", json.dumps(usage) + "\n")
