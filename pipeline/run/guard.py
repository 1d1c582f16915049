"""The guard against divergence, the same for pretraining, SFT, RL and distillation.

An update whose loss or gradient is not finite, or whose gradient norm is far above the latest ones, is
skipped (`Guard`). After too many of them the run goes back to the last good checkpoint, with a lower learning
rate (`rollback.guarded`); after too many rollbacks it stops by name. DeepSeek-V3 reports neither
irrecoverable spikes nor rollbacks (arXiv:2412.19437, Sec. 1); PaLM's were done by hand (arXiv:2204.02311,
Sec. 5.1).

Decisions follow from a guard's state, which checkpoints hold, and from env.json's history. So a run that
was killed and resumed makes the same updates, rollbacks included, as one that was not.
"""

import math
from typing import Any

from pipeline.errors import Stopped
from pipeline.run.metrics import say
from pipeline.settings.common import GuardSettings

WINDOW = 32
"""Latest updates that a guard remembers."""
LEAST = 4
"""Of them, those that were applied, to compare with; before that no norm is a spike."""


class Diverged(Exception):
    """Too many updates were skipped; `rollback.guarded` catches it."""

    def __init__(self, why: str, update: int, applied: int, floor: int = 0) -> None:
        """At update `update` of the stage, after `applied`; a rollback goes no further than step `floor`."""
        super().__init__(why)
        self.at = update, applied, floor


class Guard:
    """Decides on each update of one model whether it is applied."""

    def __init__(self, settings: GuardSettings, clip: float, first: int = 0, era: int = 0) -> None:
        """`clip`: see `AdamWSettings`. `first` updates of the stage, of other models, come before. `era`:
        rollbacks and changes by hand so far; skips of an earlier era count no more."""
        self.settings, self.clip, self.first, self.era = settings, clip, first, era
        self.applied, self.skipped = first, 0
        self.recent: list[float | None] = []  # norms of the latest updates; None: skipped

    def accepts(self, norm: float, *, finite: bool = True) -> bool:
        """Whether an update of gradient norm `norm` may be applied; `finite`: its metrics are. Raises
        `Diverged` once `max_skipped` of the latest updates may not."""
        most, why = max((n for n in self.recent if n is not None), default=0.0), ""
        compared = len(self.recent) - self.recent.count(None) >= LEAST and self.settings.max_spike
        if not (finite and math.isfinite(norm)):
            why = "its loss or gradient is not finite"
        elif compared and norm > max(self.clip, self.settings.max_spike * most):
            why = f"its gradient norm {norm:.3g} is a spike (at most {most:.3g} before)"
        self.recent = [*self.recent, None if why else norm][-WINDOW:]
        if not why:
            self.applied += 1
            return True
        self.skipped += 1
        update, lately = self.applied + self.skipped, self.recent.count(None)
        say(f"update {update} skipped: {why}; {self.skipped} so far")
        if lately >= self.settings.max_skipped:
            why = f"{lately} of the last {len(self.recent)} updates were skipped; the last: {why}"
            raise Diverged(why, update, self.applied, self.first)
        return False

    def check_trained(self, what: str) -> None:
        """Raise `Stopped` where no update was applied: the model would be the one that it started from."""
        if self.applied == self.first:
            raise Stopped(f"{what}: no update was applied, so the model is the one it began with; see above")

    def state_dict(self) -> dict[str, Any]:
        """What the next decision depends on."""
        counts = {"applied": self.applied, "skipped": self.skipped, "era": self.era}
        return counts | {"recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.applied, self.skipped, past = state["applied"], state["skipped"], state["era"] < self.era
        self.recent = [norm for norm in state["recent"] if norm is not None or not past]
