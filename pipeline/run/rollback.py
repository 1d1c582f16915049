"""Back to the last good checkpoint after a divergence, with a lower learning rate; see `guard`."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import Stopped
from pipeline.run.directory import RunDir
from pipeline.run.guard import Diverged
from pipeline.settings.common import AdamWSettings, GuardSettings

T = TypeVar("T")
S = TypeVar("S", bound=AdamWSettings)


def guarded(run_dir: RunDir, settings: GuardSettings, attempt: Callable[[], T]) -> T:
    """What `attempt` returns. It opens all that it needs and goes on from the newest checkpoint, so that a
    rollback is a resume, from an earlier one and with a lower rate (`slowed`).
    Raises `Stopped`: it diverged once more than `max_rollbacks` times, or before any update was applied."""
    while True:
        try:
            return attempt()
        except Diverged as error:
            why, (update, applied, floor) = str(error), error.at
        made = len(run_dir.rollbacks(floor))  # outside the handler, which keeps the attempt's tensors alive
        if applied == floor or made >= settings.max_rollbacks:
            done = f"after {made} rollbacks" if applied > floor else "before any update was applied"
            again = f"lower the rate, if the data is sound: {run_dir.command} --resume --optim.lr VALUE"
            raise Stopped(f"{why.rstrip('.')}, {done}. {run_dir.kept()}; {again}")
        run_dir.roll_back(update, applied, floor, why, settings.rollback_lr)


def slowed(optim: S, run_dir: RunDir, floor: int = 0) -> S:
    """The optimizer's settings with the learning rate that rollbacks to step `floor` or later have left."""
    made = run_dir.rollbacks(floor)
    return dataclasses.replace(optim, lr=optim.lr * made[-1]["lr_scale"]) if made else optim
