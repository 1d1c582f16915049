"""What a stage says and checks of its verifiers: what confines programs here, how many verdicts failed."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import Stopped, UserError
from pipeline.run.metrics import say
from rewards.pool import WorkerPool
from rewards.programs.grade import active_sandbox, sandbox_gap
from rewards.reward import error_share
from rollout.types import Graded, Problem


def check_sandbox(
    stage: str, pool: WorkerPool, problems: Iterable[Problem], allow_unsafe_code: bool, tool: bool = False
) -> None:
    """Say once, where `problems` ask for programs or a `tool` runs some, which layers confine them on this
    machine. UserError: too few do (`rewards.programs.isolate.gap`), and that is not allowed."""
    if not tool and not any(problem.kind == "code" for problem in problems):
        return
    if (gap := sandbox_gap(pool)) and not allow_unsafe_code:
        raise UserError(
            f"{stage}: programs cannot be confined here: {gap}. Grade them on another machine, or add "
            "--allow-unsafe-code, which lets them do what you may do."
        )
    say(f"{stage}: programs are confined by {active_sandbox(pool)}")


def check_errors(out: Path, graded: Sequence[Graded], most: float) -> None:
    """Stopped: the verifier failed for a larger share of the completions in `out` than `most`."""
    share, why = error_share(graded)
    if share > most:
        raise Stopped(
            f"evaluate: the verifier failed for {share:.0%} of {len(graded)} rollouts, more than "
            f"max_error_share={most:g}; most often: {why}. They are kept: once that is mended, "
            f"`grade {out} NEW_FOLDER` grades them again"
        )
