"""A child process takes the weights of a 1.5B policy by CUDA IPC, again and again, and proves what it has."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.transport import BUCKET_BYTES, Receiver, SharedFile, SharedGpu, send
from rollout.weights import fingerprint
from tests.gpu.checks.compare import measured, true

SUMMARY = "3.1 GB to a child process by CUDA IPC five times: time, fingerprints, memory"
SHAPES = [(151_936, 1536), *28 * [(1536, 1536), (512, 1536), (1536, 1536), (17_920, 1536), (1536, 8960)]]
TIMES = 5
MOST_S = 0.5
MOST_GROWTH = 64 << 20
"""Bytes that memory may grow by from the second time to the last."""


def receive(pipe: Connection, device: str) -> None:
    """The child: copies each bucket's tensors to its own, and answers with the bucket's fingerprint."""
    receiver, held = Receiver(torch.device(device)), dict[str, Tensor]()
    while message := pipe.recv_bytes():
        if message == b"held":
            pipe.send(fingerprint(held.values()))
            continue
        tensors, found = receiver.read(message)
        for name, tensor in tensors:
            held.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
        pipe.send(found)
    receiver.close()


def run(
    device: torch.device, shapes: Sequence[tuple[int, ...]] = SHAPES, bucket_bytes: int = BUCKET_BYTES
) -> dict[str, Any]:
    """Claims: the child holds what was sent, each time; seconds of the slowest but the first; memory."""
    weights = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes]
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs, str(device)), daemon=True)
    process.start()
    theirs.close()  # so that the end of a child that fails is seen
    equal, times, free = [], list[float](), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        gpu = device.type == "cuda"
        outlet = SharedGpu(bucket_bytes, device) if gpu else SharedFile(bucket_bytes, Path(folder))
        for round_ in range(TIMES):
            for weight in weights:
                weight.add_(round_)
            began = time.perf_counter()
            expected = send(named(weights), torch.bfloat16, outlet, starter(pipe))
            times.append(time.perf_counter() - began)
            pipe.send_bytes(b"held")
            equal.append(pipe.recv() == expected == fingerprint(weights))
            free.append(torch.cuda.mem_get_info(device)[0] if gpu else 0)
        pipe.send_bytes(b"")
        process.join(30)
        outlet.close()
    size = sum(weight.nbytes for weight in weights)
    slowest = {
        "claim": f"{size / 1e9:.1f} GB, the slowest but the first",
        "value": max(times[1:]),
        "unit": "s",
    }
    growth = {
        "claim": "memory from the second time to the last",
        "value": float(free[1] - free[-1]),
        "unit": "B",
    }
    return {
        "seconds_each": times,
        "claims": [
            true(f"the child holds what was sent, {TIMES} times", all(equal)),
            measured("the first, with mapping the buffer", times[0], "s"),
            slowest | ({"at_most": MOST_S} if gpu else {"at_least": 0.0}),
            growth | {"at_most": MOST_GROWTH},
        ],
    }


def named(weights: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """With a name each."""
    return ((f"weight {at}", weight) for at, weight in enumerate(weights))


def starter(pipe: Connection) -> Callable[[bytes], Callable[[], Sequence[int]]]:
    """How `send` tells the child of a bucket, and waits for its answer."""

    def start(message: bytes) -> Callable[[], Sequence[int]]:
        pipe.send_bytes(message)
        return lambda: [pipe.recv()]

    return start
