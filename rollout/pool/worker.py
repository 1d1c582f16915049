"""A pool's worker: an engine with weights of its own, in a process of its own, a Ray actor."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rollout.engine import RolloutEngine, StaleWeights
from rollout.settings import RolloutSettings
from rollout.types import FinishReason, Prompt, SamplingParams

Finished = tuple[int, int, Sequence[int], Sequence[float], FinishReason, int]
"""A rollout without its prompt: index in the task, sample, tokens, log-probabilities, reason, version."""
FLUSH_S = 0.2
"""Seconds over which finished rollouts are gathered into one answer."""


class WorkerEngine(RolloutEngine, Protocol):
    """An engine that takes weights as named tensors, which is how they reach another process."""

    def load_tensors(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`load_weights` from tensors by public name, which fit the engine's model."""

    def live_weights(self) -> int:
        """Fingerprint of the weights that the engine computes with."""


Opener = Callable[[str, RolloutSettings, str, int | Sequence[int] | None], RolloutEngine]
"""(checkpoint, settings, device, eos) -> an engine that is also a `WorkerEngine`. Ray pickles it by name."""


class Worker:
    """An engine behind methods that Ray calls."""

    def __init__(
        self, opener: Opener, path: str, settings: RolloutSettings, eos_token_id: int | Sequence[int] | None
    ) -> None:
        torch.set_num_threads(max(1, int(settings.worker_cpus)))
        device = "cuda" if settings.worker_gpus and torch.cuda.is_available() else "cpu"
        self.engine: WorkerEngine = opener(path, settings, device, eos_token_id)  # type: ignore[assignment]

    def identity(self) -> tuple[int, str]:
        """Process id and machine; answers when the engine is open."""
        return os.getpid(), os.uname().nodename

    def load(self, weights: dict[str, Tensor], version: int, expected: int) -> None:
        """Load these weights, and prove by the fingerprint `expected` that they are live.

        Raises:
            StaleWeights: they are not.
        """
        self.engine.load_tensors(weights.items(), version)
        if (live := self.engine.live_weights()) != expected:
            raise StaleWeights(
                f"worker {os.getpid()} holds weights with fingerprint {live:016x} after the update to "
                f"version {version}, not the {expected:016x} that were sent"
            )

    def generate(
        self,
        weights: dict[str, Tensor] | None,
        update: tuple[int, int] | None,
        prompts: list[Prompt],
        sampling: SamplingParams,
    ) -> Iterator[list[Finished]]:
        """Load `weights`, if any (version and fingerprint in `update`); yield rollouts as they finish."""
        if weights is not None and update is not None:
            self.load(weights, *update)
        finished: list[Finished] = []
        since = time.monotonic()
        for r in self.engine.generate(prompts, sampling):
            finished.append((r.index, r.sample, r.token_ids, r.logprobs, r.finish_reason, r.policy_version))
            if time.monotonic() - since > FLUSH_S:
                yield finished
                finished, since = [], time.monotonic()
        if finished:
            yield finished
