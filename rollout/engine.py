"""The seam between whoever wants completions and whatever draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rollout.types import Prompt, Rollout, SamplingParams


class EngineDied(RuntimeError):
    """The engine stopped in the middle of a request and cannot go on."""


class StaleWeights(RuntimeError):
    """The engine does not compute with the weights that it should: what it draws is not on policy."""


class RolloutEngine(Protocol):
    """Draws completions. Same prompts, seed and weights: the same greedy tokens from every engine in fp32."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield `len(prompts) * sampling.n` rollouts in any order; `index` and `sample` tell them apart."""
        ...

    def load_weights(self, source: Any, version: int) -> None:
        """Draw from `source` (an engine says what it takes) from now on; rollouts carry `version`."""
        ...

    def drain(self) -> dict[str, float]:
        """What there is to say about the draws since the last call, by metric name; often nothing."""
        ...

    def close(self) -> None:
        """Free what the engine holds. Calling it twice is fine."""
        ...
