"""A pool of engines in processes of their own, on Ray: on this machine or on a cluster.

Each free worker gets a few prompts at a time, and rollouts come back as they finish. The random numbers of a
rollout depend on its (index, sample) alone, so it is the same from any worker. A worker that dies, or returns
nothing for `timeout_s`, is replaced, and its missing rollouts are generated again: the pool passes each
rollout on once, and ends only when none is missing.

Weights go to all workers at once, from GPU to GPUs (`transport.Broadcast`), where each worker has a GPU and
none is at work. Else they are put into Ray's store, bucket by bucket, and a worker fetches the newest before
its next prompts, or, where it is at work, between two steps of its engine: completions under way go on with
them. It proves by a fingerprint that it holds them.
"""

import contextlib
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.policy import Policy
from rollout.checkpoint import context_and_vocabulary, stored_shapes
from rollout.engine import EngineDied, RolloutEngine
from rollout.pool.start import last_line, start_ray
from rollout.pool.worker import Finished, Opener, Worker, stale
from rollout.settings import RolloutSettings
from rollout.stopping import check_prompts
from rollout.transport import BUCKET_BYTES, Broadcast, Group, Outlet, buckets, join_group, send
from rollout.types import Eos, Prompt, Rollout, SamplingParams
from rollout.weights import DTYPES, MODULUS, check_shapes, device_of, shapes

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
    by_worker: Counter[int] = field(default_factory=Counter)  # rollouts by process id


class RolloutPool(RolloutEngine):
    """`RolloutEngine` over workers on Ray."""

    in_flight = True

    def __init__(
        self,
        path: Path | str,
        settings: RolloutSettings,
        opener: Opener,
        *,
        eos_token_id: Eos = None,
        trainer: torch.device | None = None,
        task_prompts: int = 0,
    ) -> None:
        """
        Args:
            path: checkpoint that every worker opens; on a cluster all machines must reach it.
            opener: opens an engine in a worker; a function at the top of a module.
            eos_token_id: ends a completion; None = the checkpoint's.
            trainer: its device, which no worker gets unless it asks for less than a GPU.
            task_prompts: prompts that a worker generates together; a rollout's rounding then does not depend
                on the number of workers. 0 = by that number.

        Raises:
            ModuleNotFoundError: Ray is not installed here.
            EngineDied: a worker could not be started.
            ValueError: too few GPUs beside the trainer's.
        """
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "workers need Ray, which is not installed: pip install '.[cluster]', or set workers = 0"
            ) from error
        self.ray: Any = ray
        self.path, self.settings, self.opener = Path(path), settings, opener
        self.eos_token_id, self.task_prompts = eos_token_id, task_prompts
        self.dtype = DTYPES["float32" if settings.dtype == "auto" else settings.dtype]
        self.context, self.vocab_size = context_and_vocabulary(self.path, settings.vllm.context)
        self.version, self.counts, self.closed = 0, Counts(), False
        self.lock = threading.Lock()  # one at a time: weights that change, tasks that begin
        self.latest: tuple[list[Any], int] | None = None  # buckets in Ray's store, fingerprint of all
        self.group: tuple[list[Any], Group] | None = None  # for broadcasts, and its workers
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.own_ray = not ray.is_initialized()
        if self.own_ray:
            start_ray(settings, trainer)
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
        remote = self.ray.remote(concurrency_groups={"mail": 1})(Worker).options(**options, max_restarts=0)
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
                with self.lock:
                    able = [m for m in self.members if self.latest is not None or m.version == self.version]
                    if not able:
                        raise EngineDied(
                            "every worker that held the newest weights was lost; load them again."
                        )
                    for member in able:
                        if member.task is None and queue:
                            self._hand_out(member, queue.popleft(), sampling)
                for member, finished in self._answers(queue):
                    yield from self._accept(member, finished, prompts, queue)
        finally:
            for member in self.members:  # after an error, or when the caller closes the iterator
                member.task = member.stream = None

    def _tasks(self, prompts: list[Prompt], n: int) -> Iterator[Task]:
        share = max(1, -(-len(prompts) // (TASKS_PER_WORKER * len(self.members))))
        size = self.task_prompts or share
        for first in range(0, len(prompts), size):
            own = prompts[first : first + size]
            yield Task(first, own, {(first + i, s) for i in range(len(own)) for s in range(n)})

    def _hand_out(self, member: Member, task: Task, sampling: SamplingParams) -> None:
        """Send a worker a task, and the newest weights if it does not hold them."""
        update = None
        if self.latest is not None and member.version != self.version:
            update, member.version = (*self.latest, self.version), self.version
        seeded = replace(sampling, first_index=sampling.first_index + task.first)
        generate = member.actor.generate.options(num_returns="streaming")
        member.stream = generate.remote(update, task.prompts, seeded)
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
        for at, sample, token_ids, logprobs, finish_reason, version, routes, last in finished or ():
            name = (task.first + at, sample)
            if name not in task.missing:
                self.counts.repeated += 1
            else:
                task.missing.remove(name)
                self.counts.by_worker[member.pid] += 1
                made = (sample, token_ids, logprobs, finish_reason, version, routes)
                yield Rollout(prompts[name[0]], name[0], *made, last_version=last)
        if finished is None:
            member.task = member.stream = None
            if task.missing:
                self._again(task, queue, f"{len(task.missing)} rollouts of them never came back")

    # ---- weights

    def load_weights(self, source: Policy, version: int) -> None:
        """Every worker has `source`'s weights before its next prompts; one at work, very soon.

        Raises:
            ValueError: weights of another shape than those that the workers opened.
            StaleWeights: a worker does not hold what was broadcast.
        """
        found = shapes(source)
        self._shapes = self._shapes or stored_shapes(self.path, found)
        check_shapes(found, self._shapes, self.path)
        with self.lock:
            self.version, self.latest = version, None
            (self._broadcast if self._can_broadcast(source) else self._store)(source)

    def _can_broadcast(self, source: Policy) -> bool:
        """Whether trainer and workers each have a GPU to themselves, and every worker listens."""
        gpus = device_of(source).type == "cuda" and self.settings.worker_gpus >= 1
        return gpus and not any(member.task for member in self.members)

    def _store(self, source: Policy) -> None:
        """Put weights into Ray's store, from which workers fetch them, those that are still to come too;
        workers that are busy are told at once."""
        outlet, refs, expected = Outlet(BUCKET_BYTES), [], 0
        for bucket in buckets(source.public_weights(), self.dtype, outlet):
            refs.append(self.ray.put((bucket, outlet.flat[: bucket.nbytes].numpy())))
            expected += bucket.fingerprint
        self.latest = (refs, expected % MODULUS)
        for actor in [member.actor for member in self.members if member.task]:
            actor.send.options(concurrency_group="mail").remote((*self.latest, self.version))

    def _broadcast(self, source: Policy) -> None:
        """Send weights to all workers at once. A worker that is opened later has none until the next time."""
        device, actors = device_of(source), [member.actor for member in self.members]
        if self.group is None or self.group[0] != actors:
            host, world = self.ray.util.get_node_ip_address(), len(actors) + 1
            store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
            joined = [a.join.remote(host, store.port, rank, world) for rank, a in enumerate(actors, 1)]
            self.group = actors, join_group(store, 0, world, device)
            self.ray.get(joined)
        outlet = Broadcast(BUCKET_BYTES, device, self.group[1])
        loaded = [actor.receive.remote(self.version) for actor in actors]
        try:
            expected = send(source.public_weights(), self.dtype, outlet, outlet.start)
        finally:
            outlet.close()
        try:
            found = self.ray.get(loaded)
        except self.ray.exceptions.RayActorError as error:
            raise EngineDied(f"a worker was lost while it took weights: {last_line(error)}") from error
        for member, live in zip(self.members, found, strict=True):
            if live != expected:
                raise stale(member.pid, self.version, live, expected)
            member.version = self.version

    def close(self) -> None:
        """Stop the workers, and Ray where this pool started it."""
        if self.closed:
            return
        self.closed = True
        for member in self.members:
            self._kill(member)
        if self.own_ray:
            self.ray.shutdown()
