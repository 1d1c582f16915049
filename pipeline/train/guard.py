"""Guards against divergence, the same for pretraining, SFT, RL and distillation.

An update whose loss or gradient is not finite, or whose gradient norm is far above the latest ones, is skipped
(`Guard`). Too many of them, and the run goes back to the last good checkpoint with a lower learning rate
(`guarded`), as PaLM's did by hand (arXiv:2204.02311, Sec. 5.1); after too many rollbacks it stops by name.
DeepSeek-V3 reports neither irrecoverable spikes nor rollbacks (arXiv:2412.19437, Sec. 1): that is the bar.

Steps of RL that cannot teach are said, and stop the run when they come in a row (`RolloutGuard`).

What a guard decides follows from its state, which checkpoints hold, and from env.json's history. So a run that
was killed and resumed makes the same updates, rollbacks included, as one that was not.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pipeline.errors import Stopped
from pipeline.run.directory import RunDir
from pipeline.run.metrics import say
from pipeline.settings.common import AdamWSettings, GuardSettings
from pipeline.train.rollouts import error_share
from rollout.types import Graded

T = TypeVar("T")
S = TypeVar("S", bound=AdamWSettings)
WINDOW = 32
"""Latest updates that a guard remembers."""
LEAST = 4
"""Of them, those with a gradient norm to compare with; before that no norm is a spike."""
FAILED_STEPS = 2
"""Steps in a row with too many verifier failures that stop a run; one alone may be an accident."""


class Diverged(Exception):
    """Too many updates were skipped. `guarded` catches it."""

    def __init__(self, why: str, update: int, applied: int, floor: int = 0) -> None:
        """After `update` updates of the stage, `applied` of them; a rollback goes no further than step `floor`."""
        super().__init__(why)
        self.why, self.update, self.applied, self.floor = why, update, applied, floor


class Guard:
    """Decides on each update of one optimizer whether it is applied."""

    def __init__(self, settings: GuardSettings, clip: float, first: int = 0) -> None:
        """`clip` is the largest gradient norm that is applied, 0 = any; `first` updates of the stage, of other
        models, come before."""
        self.settings, self.clip, self.first = settings, clip, first
        self.applied, self.skipped = first, 0
        self.recent: list[float | None] = []  # norms of the latest updates; None: skipped

    @property
    def good(self) -> int | None:
        """Updates applied so far, for the checkpoint that is due; None in the midst of skipped ones."""
        return self.applied if self.recent and self.recent[-1] is not None else None

    def accepts(self, norm: float, *, finite: bool) -> bool:
        """Whether an update of gradient norm `norm` may be applied; `finite`: its loss and metrics are.

        One that may not is counted and said on the console.

        Raises:
            Diverged: `max_skipped` of the latest updates were skipped.
        """
        settings, latest = self.settings, [n for n in self.recent if n is not None]
        why = ""
        if not (finite and math.isfinite(norm)):
            why = "its loss or gradient is not finite"
        elif settings.max_spike and len(latest) >= LEAST and norm > self.clip:
            if norm > settings.max_spike * max(latest):
                why = f"its gradient norm {norm:.3g} is a spike (at most {max(latest):.3g} before)"
        self.recent = [*self.recent, None if why else norm][-WINDOW:]
        if not why:
            self.applied += 1
            return True
        self.skipped += 1
        update, lately = self.applied + self.skipped, self.recent.count(None)
        say(f"update {update} skipped: {why}; {self.skipped} so far")
        if lately >= settings.max_skipped:
            raise Diverged(f"{lately} of the last {len(self.recent)} updates were skipped; the last: {why}",
                           update, self.applied, self.first)  # fmt: skip
        return False

    def check_trained(self, what: str) -> None:
        """Raise `Stopped` where no update was applied: the model would be the one that it started from."""
        if self.applied == self.first:
            raise Stopped(f"{what}: no update was applied, so the model is the one it began with; see above")

    def state_dict(self) -> dict[str, Any]:
        """What the next decision depends on."""
        return {"applied": self.applied, "skipped": self.skipped, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.applied, self.skipped, self.recent = state["applied"], state["skipped"], list(state["recent"])


def guarded(run_dir: RunDir, settings: GuardSettings, attempt: Callable[[], T]) -> T:
    """What `attempt` returns. It opens all that it needs and goes on from `run_dir`'s newest checkpoint, so that
    a rollback is a resume: of an earlier checkpoint, with a lower rate (`slowed`).

    Raises:
        Stopped: it diverged once more than `max_rollbacks` times, or before any update was applied.
    """
    while True:
        try:
            return attempt()
        except Diverged as error:
            why, update, applied, floor = error.why, error.update, error.applied, error.floor
        # Out of the handler, which would keep the failed attempt's tensors alive.
        if applied == floor or run_dir.rollback_count >= settings.max_rollbacks:
            done = (
                f" after {run_dir.rollback_count} rollbacks"
                if applied > floor
                else " before any update was applied"
            )
            advice = (
                "lower optim.lr" if applied > floor else "look at the model and the data that it began with"
            )
            again = f"{run_dir.command} --resume --optim.lr VALUE"
            raise Stopped(f"{why}{done}. {run_dir.kept()}; {advice}, then: {again}")
        run_dir.roll_back(update, applied, floor, why, settings.rollback_lr)


def slowed(optim: S, run_dir: RunDir) -> S:
    """The optimizer's settings with the learning rate that rollbacks have left."""
    scale = run_dir.lr_scale
    return optim if scale == 1 else dataclasses.replace(optim, lr=optim.lr * scale)


class RolloutGuard:
    """Watches the rollouts of each step of RL or rejection sampling."""

    def __init__(self, run_dir: RunDir, max_error_share: float, max_idle_steps: int, max_tokens: int) -> None:
        """See `GrpoSettings` on the bounds; `max_tokens` is each completion's limit."""
        self.run_dir, self.max_tokens = run_dir, max_tokens
        self.max_error_share, self.max_idle_steps = max_error_share, max_idle_steps
        self.failed = self.idle = 0  # steps in a row

    def look(self, step: int, graded: Sequence[Graded], spread: float = 1.0) -> None:
        """Say what is wrong with the rollouts of a step; `spread` is the share of groups whose rewards differ."""
        n, share = len(graded), error_share(graded)
        self.failed = self.failed + 1 if share > self.max_error_share else 0
        self.idle = 0 if spread else self.idle + 1
        if share:
            first = next(g for g in graded if g.verdict == "error")
            say(
                f"step {step}: the verifier failed on {round(share * n)} of {n} rollouts; the first: {first.detail}"
            )
        if all(g.rollout.finish_reason == "length" for g in graded):
            say(f"step {step}: all {n} rollouts were cut at max_tokens={self.max_tokens}: raise --max-tokens")
        if not spread and share < 1:
            mean = sum(g.reward for g in graded if g.verdict != "error") / (n - round(share * n))
            what = "no group of this step has spread in its rewards, so it teaches nothing"
            say(f"step {step}: {what} (mean {mean:.3g}): take easier or harder problems, or a larger group")

    def check(self) -> None:
        """Raise `Stopped` where too many steps in a row were of no use."""
        again = f"{self.run_dir.kept()}; then: {self.run_dir.command} --resume"
        if self.failed >= FAILED_STEPS:
            what = f"the verifier failed on more than {self.max_error_share:.0%} of the rollouts"
            raise Stopped(
                f"{what} of {self.failed} steps in a row (max_error_share). Mend it, see above. {again}"
            )
        if self.max_idle_steps and self.idle >= self.max_idle_steps:
            what = f"no group had spread in its rewards for {self.idle} steps in a row (max_idle_steps; 0 goes on)"
            raise Stopped(
                f"{what}: the problems are too hard, too easy, or no reward tells answers apart. {again}"
            )

    def state_dict(self) -> dict[str, int]:
        """What `check` depends on."""
        return {"failed": self.failed, "idle": self.idle}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` returned."""
        self.failed, self.idle = state["failed"], state["idle"]
