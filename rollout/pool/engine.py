"""A pool of engines in processes of their own, on Ray: on this machine or on a cluster.

Each free worker gets a few prompts at a time, and rollouts come back as they finish. The random numbers of a
rollout depend on its (index, sample) alone, so it is the same from any worker. A worker that dies, or returns
nothing for `timeout_s`, is replaced, and its missing rollouts are generated again: the pool passes each
rollout on once, and ends only when none is missing.

Weights are put into Ray's store once a version; a worker fetches the newest before its next prompts and
proves by a fingerprint that it holds them. Rollouts that are too many versions old are generated again.
"""

import contextlib
import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.policy import Policy
from rollout.checkpoint import context_and_vocabulary, stored_shapes
from rollout.engine import EngineDied
from rollout.pool.worker import Finished, Opener, Worker
from rollout.settings import RolloutSettings
from rollout.stopping import check_prompts
from rollout.types import Prompt, Rollout, SamplingParams
from rollout.weights import DTYPES, check_shapes, fingerprint, in_dtype, shapes

TASKS_PER_WORKER = 4
"""Tasks that each worker's share of a request is split into: with more, workers idle less at the end; with
fewer, batches are larger."""
MOST_FAILURES = 3
"""Workers lost over the same prompts after which the request fails."""
START_S = 300.0
"""Seconds in which a worker must start."""


@dataclass(slots=True)
class Task:
    """Prompts of a request that one worker generates together."""

    first: int  # index of the first in the request
    prompts: list[Prompt]
    missing: set[tuple[int, int]]  # (index in the request, sample) of the rollouts that have not come back
    failures: int = 0


@dataclass(slots=True)
class Member:
    """One worker, and its task."""

    actor: Any
    pid: int = 0
    here: bool = False  # whether it runs on this machine
    version: int = 0  # of the weights that were last sent to it
    task: Task | None = None
    stream: Any = None  # Ray's generator of the task's rollouts
    alive_at: float = 0.0  # time of its last answer, monotonic seconds


@dataclass(slots=True)
class Counts:
    """Faults and rollouts of a pool since it was opened."""

    replaced: int = 0  # workers that died or hung
    again: int = 0  # rollouts that were requested again
    repeated: int = 0  # rollouts that came back a second time and were dropped
    stale: int = 0  # rollouts that were too old and were generated again
    by_worker: Counter[int] = field(default_factory=Counter)  # rollouts by process id


class RolloutPool:
    """`RolloutEngine` over workers on Ray."""

    def __init__(
        self,
        path: Path | str,
        settings: RolloutSettings,
        opener: Opener,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        max_staleness: int = 1,
    ) -> None:
        """
        Args:
            path: checkpoint that every worker opens; on a cluster all machines must reach it.
            opener: opens an engine in a worker; a function at the top of a module.
            eos_token_id: ends a completion; None = the checkpoint's.
            max_staleness: versions by which a rollout may be older than the newest weights.

        Raises:
            ModuleNotFoundError: Ray is not installed here.
            EngineDied: a worker could not be started.
        """
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "rollout.workers needs Ray, which is not installed: pip install '.[cluster]', "
                "or set rollout.workers = 0"
            ) from error
        self.ray: Any = ray
        self.path, self.settings, self.opener = Path(path), settings, opener
        self.eos_token_id, self.max_staleness = eos_token_id, max_staleness
        self.context, self.vocab_size = context_and_vocabulary(self.path, settings.vllm.context)
        self.version, self.counts, self.closed = 0, Counts(), False
        self.latest: tuple[Any, int] | None = None  # reference to the weights in Ray's store, fingerprint
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.own_ray = not ray.is_initialized()
        if self.own_ray:
            start_ray(settings)
        self.members: list[Member] = []
        try:
            actors = [self._actor() for _ in range(settings.workers)]
            self.members = [self._ready(actor) for actor in actors]
        except BaseException:
            self.close()
            raise

    # ---- members

    def _actor(self) -> Any:
        options = {"num_cpus": self.settings.worker_cpus, "num_gpus": self.settings.worker_gpus}
        remote = self.ray.remote(Worker).options(**options, max_restarts=0)
        return remote.remote(self.opener, str(self.path.resolve()), self.settings, self.eos_token_id)

    def _ready(self, actor: Any) -> Member:
        """Wait until a worker has opened its engine."""
        try:
            pid, host = self.ray.get(actor.identity.remote(), timeout=START_S)
        except self.ray.exceptions.GetTimeoutError as error:
            raise EngineDied(
                f"a worker did not start within {START_S:.0f} s: has the Ray cluster "
                f"{self.settings.worker_cpus:g} CPUs and {self.settings.worker_gpus:g} GPUs free for each of "
                f"{self.settings.workers} workers?"
            ) from error
        except self.ray.exceptions.RayError as error:
            raise EngineDied(f"a worker could not open {self.path}: {last_line(error)}") from error
        return Member(actor, pid, host == os.uname().nodename)

    def _replace(self, member: Member, queue: deque[Task], why: str) -> None:
        """Start a new worker for a lost one, whose task goes to the front of the queue."""
        self._kill(member)
        self.counts.replaced += 1
        if member.task is not None:
            lost = f"workers were lost ({why}); is memory short? Lower rollout.workers or max_tokens"
            self._again(member.task, queue, lost)
        self.members[self.members.index(member)] = self._ready(self._actor())

    def _again(self, task: Task, queue: deque[Task], why: str) -> None:
        """Queue a task again for its missing rollouts, unless it has failed too often."""
        task.failures += 1
        self.counts.again += len(task.missing)
        if task.failures >= MOST_FAILURES:
            last = task.first + len(task.prompts) - 1
            raise EngineDied(f"prompts {task.first} to {last} failed {MOST_FAILURES} times: {why}.")
        queue.appendleft(task)

    def _kill(self, member: Member) -> None:
        self.ray.kill(member.actor)
        if member.here and member.pid:  # a stopped process does not react to Ray
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)

    # ---- generation

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield each rollout once, as they come back.

        Raises:
            ValueError: at once, when a prompt is empty, too long, or of another vocabulary.
            FloatingPointError: when the model's logits are not finite.
            EngineDied: `MOST_FAILURES` workers were lost over the same prompts.
            StaleWeights: a worker does not hold the weights that it was sent.
        """
        if self.closed:
            raise EngineDied("this pool is closed; open a new one.")
        check_prompts(prompts, self.context, self.vocab_size)
        return self._generate(list(prompts), sampling)

    def _generate(self, prompts: list[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        queue = deque(self._tasks(prompts, sampling.n))
        try:
            while queue or any(member.task for member in self.members):
                for member in list(self.members):
                    if member.task is None and queue:
                        self._hand_out(member, queue.popleft(), sampling)
                for member, finished in self._answers(queue):
                    yield from self._accept(member, finished, prompts, queue)
        finally:
            for member in self.members:  # after an error, or when the caller closes the iterator
                member.task = member.stream = None

    def _tasks(self, prompts: list[Prompt], n: int) -> Iterator[Task]:
        size = max(1, -(-len(prompts) // (TASKS_PER_WORKER * len(self.members))))
        for first in range(0, len(prompts), size):
            own = prompts[first : first + size]
            yield Task(first, own, {(first + i, s) for i in range(len(own)) for s in range(n)})

    def _hand_out(self, member: Member, task: Task, sampling: SamplingParams) -> None:
        """Send a worker a task, and the newest weights if it does not hold them."""
        weights = update = None
        if self.latest is not None and member.version != self.version:
            weights, expected = self.latest
            update, member.version = (self.version, expected), self.version
        seeded = replace(sampling, first_index=sampling.first_index + task.first)
        generate = member.actor.generate.options(num_returns="streaming")
        member.stream = generate.remote(weights, update, task.prompts, seeded)
        member.task, member.alive_at = task, time.monotonic()

    def _answers(self, queue: deque[Task]) -> Iterator[tuple[Member, list[Finished] | None]]:
        """Rollouts from the workers that have some ready; None for the end of a task."""
        busy = {id(m.stream): m for m in self.members if m.task}
        ready, _ = self.ray.wait([m.stream for m in busy.values()], num_returns=1, timeout=0.5)
        errors = self.ray.exceptions
        for stream in ready:
            member = busy[id(stream)]
            try:
                yield member, self.ray.get(next(stream))
            except StopIteration:
                yield member, None
            except (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError) as error:
                self._replace(member, queue, last_line(error))
            except errors.RayTaskError as error:
                cause = error.as_instanceof_cause()
                if not isinstance(cause, EngineDied):
                    raise cause from None
                self._replace(member, queue, last_line(error))
        for member in busy.values():
            silent = time.monotonic() - member.alive_at
            if member.task is not None and member in self.members and silent > self.settings.timeout_s:
                self._replace(member, queue, f"no answer for {silent:.0f} s")

    def _accept(
        self, member: Member, finished: list[Finished] | None, prompts: list[Prompt], queue: deque[Task]
    ) -> Iterator[Rollout]:
        """Pass on new rollouts; at the end of a task, queue it again if some are missing."""
        task, member.alive_at = member.task, time.monotonic()
        assert task is not None
        for at, sample, token_ids, logprobs, finish_reason, version in finished or ():
            name = (task.first + at, sample)
            if name not in task.missing:
                self.counts.repeated += 1
            elif version < self.version - self.max_staleness:
                self.counts.stale += 1
            else:
                task.missing.remove(name)
                self.counts.by_worker[member.pid] += 1
                yield Rollout(prompts[name[0]], name[0], sample, token_ids, logprobs, finish_reason, version)
        if finished is None:
            member.task = member.stream = None
            if task.missing:
                self._again(task, queue, f"{len(task.missing)} rollouts were too old or never came back")

    # ---- weights

    def load_weights(self, source: Policy, version: int) -> None:
        """Broadcast: every worker loads `source`'s weights before its next prompts.

        Raises:
            ValueError: weights of another shape than those that the workers opened.
        """
        found = shapes(source)
        self._shapes = self._shapes or stored_shapes(self.path, found)
        check_shapes(found, self._shapes, self.path)
        weights = in_dtype(source.public_weights(), DTYPES[self.settings.dtype])
        sent = {name: tensor.cpu() for name, tensor in weights}
        self.latest = (self.ray.put(sent), fingerprint(sent.values()))
        self.version = version

    def drain(self) -> dict[str, float]:
        """Empty: a pool has no metrics."""
        return {}

    def close(self) -> None:
        """Stop the workers, and Ray where this pool started it."""
        if self.closed:
            return
        self.closed = True
        for member in self.members:
            self._kill(member)
        if self.own_ray:
            self.ray.shutdown()


def start_ray(settings: RolloutSettings) -> None:
    """Join the cluster at `settings.address`, or start a Ray on this machine with CPUs for the workers."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    env["OMP_NUM_THREADS"] = str(max(1, int(settings.worker_cpus)))
    common: dict[str, Any] = {"runtime_env": {"env_vars": env}, "log_to_driver": False}
    if settings.address:
        try:
            ray.init(address=settings.address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise EngineDied(f"no Ray cluster at {settings.address}: {last_line(error)}") from error
        return
    cores = max(os.cpu_count() or 1, int(settings.workers * settings.worker_cpus + 0.999))
    ray.init(address="local", num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR, **common)


def last_line(error: BaseException) -> str:
    """The last line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
