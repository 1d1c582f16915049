"""What a run says by itself about a mismatch: from the numbers that an update has anyway."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pipeline.doctor.findings import ADVICE
from pipeline.doctor.gaps import PRESENT, UNENDED, causes, evidence, signature
from pipeline.run.metrics import say
from pipeline.train.pack import Micro
from rollout.types import Graded

MOST = 1_000_000
"""Tokens, about, that a signature is made of: it sorts them, 0.4 s of a CPU for each million."""


class LiveDoctor:
    """Names a cause once; measures only where there is a gap."""

    def __init__(self, eos: frozenset[int], stale: bool) -> None:
        """`eos`: ids that end a completion. `stale`: rollouts are older than the policy on purpose."""
        self.eos, self.stale = eos, stale
        self.step = 0
        self.named = dict[str, str]()  # evidence by kind
        self.sound = False  # a step of this session had no gap

    @property
    def cause(self) -> str:
        """Why engine and trainer differ, as far as it was named."""
        told = (f"{kind}: {what}" for kind, what in self.named.items())
        return "; ".join(told).replace("stale_weights:", "the rollouts do not come from these weights:")

    def rollouts(self, step: int, graded: Sequence[Graded]) -> dict[str, float]:
        """Look at how completions ended; a metric where end tokens are missing."""
        self.step = step
        stopped = [g.rollout.token_ids[-1] for g in graded if g.rollout.finish_reason == "stop"]
        share = sum(last not in self.eos for last in stopped) / max(1, len(stopped)) if self.eos else 0.0
        if share >= UNENDED:
            what = f"{share:.0%} of the {len(stopped)} completions that stopped end in none of the ids"
            self.name("eos", f"{what} {', '.join(map(str, sorted(self.eos)))}")
        return {"rollout/unended": share} if share else {}

    def gaps(self, mismatch: float, scored: Sequence[tuple[Micro, Tensor]]) -> dict[str, float]:
        """Look at an update of which `mismatch` is the KL between engine and trainer, nats a token, and
        `scored` its micro-batches with the trainer's log-probabilities; the signature of a gap as metrics."""
        if not mismatch > PRESENT:
            self.sound = True
            return {}
        scored = scored[:: 1 + sum(len(logprobs) for _, logprobs in scored) // MOST]
        engine = np.concatenate([part.rollout_logprobs.double().cpu().numpy() for part, _ in scored])
        trainer = np.concatenate([logprobs.double().cpu().numpy() for _, logprobs in scored])
        starts = np.flatnonzero(np.concatenate([_begins(part) for part, _ in scored]))
        gains = np.concatenate([part.advantages.double().cpu().numpy() for part, _ in scored])[starts]
        found = signature(engine, trainer, starts, gains)
        older = self.stale and self.step > 1  # the first rollouts are not, and show other causes
        for kind in causes(found, template=True, updates_began_it=self.sound or older):
            if not (kind == "stale_weights" and self.stale):
                self.name(kind, evidence(found))
        return found

    def name(self, kind: str, what: str) -> None:
        """Say the cause and what to do, the first time."""
        if kind not in self.named:
            say(f"step {self.step}: {kind}: {what}. {ADVICE[kind]}")
        self.named.setdefault(kind, what)


def _begins(part: Micro) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each scored token (n) is the first of its rollout."""
    rollout = part.rollout.cpu().numpy()
    return np.diff(rollout, prepend=-1) != 0
