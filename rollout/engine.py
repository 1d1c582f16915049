"""The seam between code that needs completions and the engines that generate them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from rollout.types import Prompt, Rollout, SamplingParams


class EngineDied(RuntimeError):
    """The engine stopped in the middle of a request and cannot go on."""


class Unanswerable(ValueError):
    """A request that an engine refuses at once: a prompt, or limits that do not fit."""


class StaleWeights(RuntimeError):
    """The engine does not compute with the expected weights, so its completions are not on policy."""


class RolloutEngine(Protocol):
    """Generates completions. In fp32 all engines agree on the greedy tokens of the same weights."""

    in_place: bool = False
    """Whether it generates from the trainer's own tensors."""
    in_flight: bool = False
    """Whether `load_weights` may be called from another thread during a request: completions under way go on
    with the new weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield `len(prompts) * sampling.n` rollouts in any order; `index` and `sample` tell them apart."""

    def load_weights(self, source: Any, version: int) -> None:
        """Generate from `source`, a policy, from now on; rollouts carry `version`."""

    def rest(self) -> bool:
        """Free what is not needed until the next request; whether that needs `load_weights` first."""
        return False

    def drain(self) -> dict[str, float]:
        """Metrics of the generation since the last call, by metric name; empty where an engine has none."""
        return {}

    def close(self) -> None:
        """Free what the engine holds. Calling it twice is fine."""


class Renewable(RolloutEngine, Protocol):
    """An engine that can take weights between two steps of a request."""

    version: int = 0
    """Of the weights."""
    renew: Callable[[], bool] = staticmethod(lambda: False)
    """Called between the steps of a request: load weights that wait for it, if any; whether it did."""


class WrappingEngine(RolloutEngine):
    """What engines share that change the requests or rollouts of another."""

    engine: RolloutEngine

    def load_weights(self, source: Any, version: int) -> None:
        """As the engine."""
        self.engine.load_weights(source, version)

    def rest(self) -> bool:
        """As the engine."""
        return self.engine.rest()

    def drain(self) -> dict[str, float]:
        """As the engine."""
        return self.engine.drain()

    def close(self) -> None:
        """As the engine."""
        self.engine.close()
