"""`python -m pipeline up STAGE`: make a stage and, first, the stages that it needs. `make STAGE` calls it.

The graph is `Stage.after` in the stage table, less the stages that a preset has no config for. The configs
alone do not define it: `report` reads the scores of `eval` without a setting for it, and `eval` scores the
models that exist. A test holds the two together: what a config names (`init_from`, ...) is in `after`.

A stage is made when its done.json exists. Age does not count. Each stage runs in a process of its own, which
returns its memory and passes on its exit code. One whose engine is vLLM runs in the environment that has it.
"""

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.arguments import load, nearest, parse, split
from pipeline.errors import UserError, command_line
from pipeline.run.files import read_toml
from pipeline.run.metrics import say
from pipeline.settings.evaluate import EvalSettings
from pipeline.settings.rollouts import GeneratingSettings
from pipeline.settings.tools import UpSettings
from pipeline.table import STAGES, Stage, recipe

TABLE = {stage.name: stage for stage in STAGES}
ALL = ("r1", "all")
VLLM = Path(".venv-vllm")
"""The environment that the Makefile makes for vLLM."""


@dataclass(frozen=True, slots=True)
class Step:
    """A stage to run: `python -m pipeline ARGV`, the line that announces it, and the Python that runs it."""

    stage: Stage
    argv: list[str]
    announcement: str
    vllm: bool = False
    one_thread: bool = False

    @property
    def python(self) -> str:
        """This Python, or that of the environment with vLLM."""
        return str(VLLM / "bin/python") if self.vllm else sys.executable


def read_command(argv: Sequence[str]) -> tuple[UpSettings, list[str]]:
    """The settings of `up` itself, and the flags for the named stages; `UserError` for a wrong value."""
    own, flags = split(UpSettings, argv)
    up = parse(UpSettings, ["--stages", *own], "python -m pipeline up", positional=True)
    others = " ".join(flag for flag in flags if flag != "--resume")
    for goal in up.stages:
        if goal not in (*TABLE, *ALL):
            hint = nearest(goal, [*TABLE, *ALL]) or f"; there are: {' '.join(TABLE)} r1"
            raise UserError(f"unknown stage {goal!r}{hint}")
        if goal in ALL and others:
            instead = f"configs/{up.preset}/STAGE.toml, or run the one stage: make STAGE ARGS='{others}'"
            raise UserError(f"{goal} takes --name, --seed, --runs and --jobs, not {others}; change {instead}")
    return up, flags


def stages_of(preset: str) -> list[Stage]:
    """The stages that a preset has a config for, in the table's order; `UserError` for an unknown preset."""
    found = sorted({file.parent.name for file in Path("configs").glob("*/*.toml")})
    if preset not in found:
        known = " ".join(found) or "none in configs/ of this folder"
        raise UserError(f"no preset {preset!r}; there are: {known}")
    return [stage for stage in STAGES if Path("configs", preset, f"{stage.name}.toml").is_file()]


def needs(stage: Stage, here: list[Stage]) -> list[Stage]:
    """What must be made before `stage` in a preset with the stages `here`."""
    before = [other for other in here if other.name in stage.after]
    return [other for other in before if other.public] or before


def plan(up: UpSettings, flags: list[str]) -> list[Step]:
    """The steps in the table's order: goals in any case, other stages where their done.json is missing.
    Raises `UserError`: preset or stage is absent, a setting is wrong, or the run has another seed."""
    here, run = stages_of(up.preset), up.runs / up.name
    if up.runs.exists() and not up.runs.is_dir():
        raise UserError(f"--runs {up.runs} is no folder; name another")
    complete = next((goal for goal in up.stages if goal in ALL), "")
    goals = [goal for goal in up.stages if goal not in ALL]
    if absent := " ".join(goal for goal in goals if TABLE[goal] not in here):
        has = " ".join(stage.name for stage in here)
        raise UserError(f"preset {up.preset} has no stage {absent}; it has: {has}")
    for file in sorted(run.glob("*/config.toml")) if up.seed is not None else ():
        if (begun := read_toml(file).get("seed")) != up.seed:
            raise UserError(f"{file} has seed {begun}, not {up.seed}; take another --name")
    planned = [TABLE[goal] for goal in goals]
    planned += [stage for stage in here if complete and stage.name in recipe() and stage not in planned]
    shared = ["--name", up.name, "--runs", str(up.runs)]
    shared += [] if up.seed is None else ["--seed", str(up.seed)]
    files = {stage: Path("configs", up.preset, f"{stage.name}.toml") for stage in here}
    for stage in planned:  # one that samples a served model needs no other's
        if stage.name not in goals or engine_of(load(stage, files[stage], [*shared, *flags])) != "endpoint":
            planned += [other for other in needs(stage, here) if other not in planned]
    steps = []
    for stage in (s for s in here if s in planned):
        goal = stage.name in goals
        if goal or not (run / stage.name / "done.json").exists():
            settings = [*shared, *(flags if goal else ["--resume"])]
            chosen = load(stage, files[stage], settings)  # refuse a wrong one before minutes of work
            check_device(chosen)
            needed = "" if goal else f"{' '.join(goals)} needs {stage.name}: making it first"
            announcement = f"{complete}: {stage.name}" if complete else needed
            argv = [stage.name, "--config", str(files[stage]), *settings]
            one_thread = getattr(chosen, "threads", 1) == 1
            steps.append(Step(stage, argv, announcement, needs_vllm(chosen), one_thread))
    return steps


def side_by_side(steps: list[Step]) -> int:
    """`jobs` where the settings leave it open."""
    free = any(a.stage.name not in b.stage.after for a, b in itertools.pairwise(steps))
    return 2 if free and all(step.one_thread for step in steps) and (os.cpu_count() or 1) > 1 else 1


def check_device(config: Any) -> None:
    """Raise `UserError` where a stage with these settings asks for a GPU and torch finds none."""
    if getattr(config, "device", "") == "cuda":
        import torch  # takes seconds, and no other settings need it

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here; set --device cpu, or auto")


def engine_of(config: Any) -> str:
    """The engine that a stage with these settings samples with, if any."""
    engine = config.engine if isinstance(config, EvalSettings) else ""
    return config.rollout.engine if isinstance(config, GeneratingSettings) else engine


def needs_vllm(config: Any) -> bool:
    """Whether a stage with these settings needs vLLM and this environment does not have it."""
    return engine_of(config) == "vllm" and importlib.util.find_spec("vllm") is None


def make_vllm() -> None:
    """Have the Makefile set up the environment with vLLM; at once where that is done.
    Raises `UserError`: it cannot be set up."""
    code = subprocess.run(["make", "--no-print-directory", str(VLLM / "stamp")], check=False).returncode
    if code:
        raise UserError(
            f"the environment with vLLM, {VLLM}, cannot be set up (exit code {code}, see above): run the "
            "same command again, or take --rollout.engine auto"
        )


class Children:
    """Running stages, each in a process of its own, and the signal that they get."""

    def __init__(self, prefixed: bool) -> None:
        self.prefixed = prefixed
        self.running: list[subprocess.Popen[str]] = []
        self.signal = 0  # the first one received, or 0

    def run(self, step: Step) -> int:
        """Run a step to its end; its exit code, 128 + n for a signal n."""
        argv = [step.python, "-m", "pipeline", *step.argv]
        pipe, errors = (subprocess.PIPE, subprocess.STDOUT) if self.prefixed else (None, None)
        env = {**os.environ, "PYTHONUNBUFFERED": "1"} if self.prefixed else None
        process = subprocess.Popen(argv, env=env, stdout=pipe, stderr=errors, text=True, errors="replace")
        self.running.append(process)
        if self.signal:
            self.forward(process)
        for line in process.stdout or ():
            sys.stdout.write(f"{step.stage.name:8} | {line.rstrip()}\n")  # one write: no line is split
            sys.stdout.flush()
        code = process.wait()
        return 128 + (self.signal or -code) if code < 0 else code

    def forward(self, process: subprocess.Popen[str]) -> None:
        """Pass the signal on. A terminal's Ctrl-C reaches a stage by itself; SIGUSR1 then changes nothing."""
        process.send_signal(signal.SIGUSR1 if self.signal == signal.SIGINT else self.signal)

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Pass the first signal on, and start nothing more."""
        if not self.signal:
            self.signal = signum
            for process in self.running:
                self.forward(process)


def make(steps: list[Step], jobs: int) -> tuple[Step, int] | None:
    """Run the steps, at most `jobs` at once, each after those that its stage may read. Returns the first step
    that failed, or that a signal kept from starting, and the exit code; None = all made."""
    children, pending = Children(jobs > 1), list(steps)
    active: dict[Future[int], Step] = {}
    failed = None
    before = {s: signal.signal(s, children.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                unfinished = {step.stage.name for step in (*pending, *active.values())}
                ready = [step for step in pending if not unfinished & set(step.stage.after)]
                for step in () if failed or children.signal else ready[: jobs - len(active)]:
                    pending.remove(step)
                    if step.announcement:
                        say(step.announcement)
                    active[pool.submit(children.run, step)] = step
                if not active:
                    break
                for future in wait(active, return_when=FIRST_COMPLETED).done:
                    step, code = active.pop(future), future.result()
                    failed = failed or ((step, code) if code else None)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return failed or ((pending[0], 128 + children.signal) if pending else None)


def main(argv: list[str]) -> int:
    """Make what the command line names; the exit code."""
    up, flags = read_command(argv)
    steps = plan(up, flags)
    if any(step.vllm for step in steps):
        make_vllm()
    if failed := make(steps, up.jobs or side_by_side(steps)):
        step, code = failed
        if code == 2:
            return code  # the stage's own line states what to do
        again = command_line("up", *(arg for arg in argv if arg != "--resume"), "--resume")
        what = "interrupted" if code == 130 else f"{step.stage.name} ended with exit code {code}"
        print(f"{what}; go on with: {again}", file=sys.stderr)
        return code
    for goal in set(up.stages) & set(ALL):
        state = "is finished" if steps else "was finished already"
        another = "For another run: make r1 ARGS='--name NAME --seed N'"
        say(f"{goal}: {up.runs / up.name} {state}: summary.json, report.html. {another}")
    return 0
