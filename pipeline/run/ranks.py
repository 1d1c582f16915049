"""Several processes of one run, a device each: torchrun, `accelerate launch` and srun start them alike.

Rank 0 writes the run directory; the others compute with it and read what it has written. What they must agree
on goes through the functions here, which every rank calls in the same order.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pipeline.errors import Stopped


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def join(cpu: bool) -> None:
    """Meet the other processes: over gloo, tensors of GPUs, one a process, over NCCL."""
    if world() > 1 and not dist.is_initialized():
        gpu = torch.cuda.is_available() and not cpu
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


@contextmanager
def together(command: str) -> Iterator[None]:
    """Within it, a process that finds another one gone raises `Stopped`; only the other knows the reason."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        why = "another process of this run has ended; its own line, or the system's log, has the reason"
        raise Stopped(f"rank {rank()}: {why}. Mend that, then: {command} --resume") from error


def wait() -> None:
    """Wait until every rank is here."""
    largest(0)


def largest(value: int) -> int:
    """The largest `value` of all ranks, on each of them."""
    if world() == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)
