"""A pool's worker: an engine with weights of its own, in a process of its own, a Ray actor."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.engine import Renewable, RolloutEngine, StaleWeights
from rollout.settings import RolloutSettings
from rollout.transport import Bucket, Group, fingerprint_of, join_group, received
from rollout.types import Eos, FinishReason, Prompt, SamplingParams

Finished = tuple[int, int, Sequence[int], Sequence[float], FinishReason, int, Any, int]
"""A rollout without its prompt: index in the task, then the fields of `Rollout` from `sample` to
`routed_experts`, and `last_version`."""
Update = tuple[Sequence[Any], int, int]
"""Weights in Ray's store: the buckets, the fingerprint of all, the version."""
FLUSH_S = 0.2
"""Seconds over which finished rollouts are gathered into one answer."""


class WorkerEngine(Renewable, Protocol):
    """An engine that takes weights as named tensors, which is how they reach another process."""

    def load_tensors(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`load_weights` from tensors by public name, which fit the engine's model."""

    def live_weights(self) -> int:
        """Fingerprint of the weights that the engine computes with."""


Opener = Callable[[str, RolloutSettings, str, Eos], RolloutEngine]
"""(checkpoint, settings, device, eos) -> an engine that is also a `WorkerEngine`. Ray pickles it by name."""


class Worker:
    """An engine behind methods that Ray calls."""

    def __init__(self, opener: Opener, path: str, settings: RolloutSettings, eos_token_id: Eos) -> None:
        torch.set_num_threads(max(1, int(settings.worker_cpus)))
        self.device = torch.device("cuda" if settings.worker_gpus and torch.cuda.is_available() else "cpu")
        opened = opener(path, settings, self.device.type, eos_token_id)
        self.engine: WorkerEngine = opened  # type: ignore[assignment]
        self.engine.renew = self.renew
        self.mail = deque[Update](maxlen=1)
        self.group: Group = None

    def identity(self) -> tuple[int, str]:
        """Process id and machine; answers when the engine is open."""
        return os.getpid(), os.uname().nodename

    def load(self, refs: Sequence[Any], expected: int, version: int) -> None:
        """Load weights from Ray's store, and prove by the fingerprint `expected` that they are live.
        Raises `StaleWeights`: they are not."""
        self.engine.load_tensors(stored(refs), version)
        if (live := self.engine.live_weights()) != expected:
            raise stale(os.getpid(), version, live, expected)

    def join(self, host: str, port: int, rank: int, world: int) -> None:
        """Become a member of the group that weights are broadcast in, whose store is at this address."""
        store = dist.TCPStore(host, port, world, is_master=False)
        self.group = join_group(store, rank, world, self.device)

    def receive(self, version: int) -> int:
        """Load the weights that the group's rank 0 sends; the fingerprint of what is live."""
        self.engine.load_tensors(received(self.group, self.device), version)
        return self.engine.live_weights()

    def send(self, update: Update) -> None:
        """Weights for a request under way. Ray calls it in a thread beside `generate`."""
        self.mail.append(update)

    def renew(self) -> bool:
        """Load what was sent, unless it is older than the engine's weights. Raises `StaleWeights`: `load`."""
        update = self.mail.pop() if self.mail else None
        if update is None or update[2] <= self.engine.version:
            return False
        self.load(*update)
        return True

    def generate(
        self, update: Update | None, prompts: list[Prompt], sampling: SamplingParams
    ) -> Iterator[list[Finished]]:
        """Load the weights of `update`, if any (see `load`); yield rollouts as they finish."""
        if update is not None:
            self.load(*update)
        finished: list[Finished] = []
        since = time.monotonic()
        for r in self.engine.generate(prompts, sampling):
            made = (r.index, r.sample, r.token_ids, r.logprobs, r.finish_reason, r.policy_version)
            finished.append((*made, r.routed_experts, r.last_version))
            if time.monotonic() - since > FLUSH_S:
                yield finished
                finished, since = [], time.monotonic()
        if finished:
            yield finished


def stored(refs: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of buckets in Ray's store, one bucket in this process at a time.
    Raises `StaleWeights`: a bucket is not what was put there."""
    import ray

    for ref in refs:
        bucket, data = ray.get(ref)
        assert isinstance(bucket, Bucket)
        flat = torch.from_numpy(data.copy())
        if fingerprint_of(flat, bucket.slots) != bucket.fingerprint:
            raise StaleWeights(f"{bucket} arrived with another fingerprint. Load the weights again.")
        yield from bucket.tensors(flat)


def stale(pid: int, version: int, live: int, expected: int) -> StaleWeights:
    """The error of a worker that does not hold the weights that it was sent."""
    return StaleWeights(
        f"worker {pid} holds weights with fingerprint {live:016x} after the update to version {version}, not "
        f"the {expected:016x} that were sent"
    )
