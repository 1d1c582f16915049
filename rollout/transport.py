"""Weights from a trainer to engines in other processes, bucket by bucket: no second copy of the model.

The sender fills one buffer with tensors laid end to end, in the engine's type, and tells the receivers what
lies where. Each copies the buffer to its device, answers with the fingerprint of what it holds, and only then
is the buffer filled again.

    in place       an engine in the trainer's process reads its tensors: nothing of this file
    `SharedGpu`    CUDA IPC: processes on the trainer's machine map its buffer
    `Broadcast`    NCCL: GPUs of other processes and machines, in a group of their own with the trainer
    Ray's store    workers on any machine, those that are still to come too: `rollout.pool`
    `SharedFile`   no GPU, or the trainer's tensors on the CPU: a file in memory

`Receiver` needs nothing of an engine, so any child process can take weights.
"""

import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from rollout.engine import StaleWeights
from rollout.weights import MODULUS, fingerprint, held_in

BUCKET_BYTES = 512 << 20
"""Most bytes of a bucket; a larger tensor is a bucket by itself."""
ALIGNMENT = 16
"""Bytes; each tensor begins at a multiple."""
GROUP_TIMEOUT = timedelta(seconds=300)
"""In which all members of a group must take part in a transfer."""

Group = Any
"""torch's `ProcessGroupNCCL` or `ProcessGroupGloo`."""
Start = Callable[[bytes], Callable[[], Sequence[int]]]
"""Tell every receiver of a bucket; the result waits for their answers, which are `Receiver.read`'s."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the bucket's begin
    nbytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """What lies in the buffer now, and how a receiver reaches it."""

    index: int
    slots: tuple[Slot, ...]
    nbytes: int
    fingerprint: int
    handle: Any

    def __str__(self) -> str:
        """For errors."""
        return f"bucket {self.index} of the weights ({self.slots[0].name} to {self.slots[-1].name})"

    def tensors(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """Views into `flat`, the bucket's bytes, by public name."""
        return [(s.name, view_of(flat, s)) for s in self.slots]


def view_of(flat: Tensor, slot: Slot) -> Tensor:
    """The tensor of a slot, as a view into the bytes `flat`."""
    return flat[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)


def fingerprint_of(flat: Tensor, slots: Sequence[Slot]) -> int:
    """Fingerprint of a bucket's bytes: neighbours of one element size are hashed together, gaps are 0."""
    runs: list[tuple[int, int, torch.dtype]] = []
    for s in slots:
        begin, end = s.offset, s.offset + s.nbytes
        if runs and runs[-1][2].itemsize == s.dtype.itemsize:
            begin = runs.pop()[0]
        runs.append((begin, end, s.dtype))
    return fingerprint(flat[begin:end].view(dtype) for begin, end, dtype in runs)


# ---- the sender's buffer


class Outlet:
    """A buffer in this process's memory, for a caller that moves the bytes itself; the base of the others."""

    flat: Tensor
    """Its bytes (uint8)."""

    def __init__(self, nbytes: int, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.grow(nbytes)

    def grow(self, nbytes: int) -> None:
        """Replace the buffer by one of this size."""
        self.flat = torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def handle(self) -> Any:
        """What a `Receiver` finds the buffer by; it can be pickled."""

    def publish(self, nbytes: int) -> None:
        """Move the first bytes to receivers that were told of them, unless these map the buffer."""

    def close(self) -> None:
        """Free what other processes see of it."""


class SharedFile(Outlet):
    """A buffer in a file: in memory where /dev/shm has room for it, else in the folder `beside`."""

    def __init__(self, nbytes: int, beside: Path) -> None:
        self.beside, self.file = beside, Path()
        super().__init__(nbytes)

    def grow(self, nbytes: int) -> None:
        self.close()
        memory = Path("/dev/shm")
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * nbytes
        self.file = (memory if fits else self.beside) / f"r1-weights-{os.getpid()}-{uuid.uuid4().hex}"
        self.flat = torch.from_file(str(self.file), shared=True, size=nbytes, dtype=torch.uint8)

    def handle(self) -> Any:
        return "file", str(self.file), len(self.flat)

    def close(self) -> None:
        if self.file.name:
            self.file.unlink(missing_ok=True)


class SharedGpu(Outlet):
    """A buffer on a GPU, which other processes of the machine map by CUDA IPC.

    torch counts one release an export, so the buffer is exported once, and a receiver maps it once."""

    def grow(self, nbytes: int) -> None:
        super().grow(nbytes)
        name = str(torch.cuda.get_device_properties(self.device).uuid)
        self.exported = {name: pickle.dumps(reduce_tensor(self.flat))}

    def handle(self) -> Any:
        return "gpu", self.exported  # by the UUID of the GPU: processes may number GPUs differently

    def close(self) -> None:
        del self.flat
        torch.cuda.ipc_collect()


class Broadcast(Outlet):
    """A buffer whose bytes go to all other members of a process group, of which the sender is rank 0.

    A bucket is three broadcasts: the length of its description, the description, its bytes. 0 ends them."""

    def __init__(self, nbytes: int, device: torch.device, group: Group) -> None:
        self.group = group
        super().__init__(nbytes, device)

    def start(self, message: bytes) -> Callable[[], Sequence[int]]:
        """See `Start`; there are no answers: `received` checks each bucket."""
        broadcast(self.group, torch.tensor([len(message)], device=self.device))
        broadcast(self.group, torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self.device))
        return tuple

    def publish(self, nbytes: int) -> None:
        broadcast(self.group, self.flat[:nbytes])

    def close(self) -> None:
        """End the transfer. The group is the caller's."""
        broadcast(self.group, torch.tensor([0], device=self.device))


def join_group(store: dist.Store, rank: int, world: int, device: torch.device) -> Group:
    """A process group beside torch's default one; every member calls this with the same `store`."""
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = GROUP_TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, world, options)
    return dist.ProcessGroupGloo(store, rank, world, GROUP_TIMEOUT)


def broadcast(group: Group, flat: Tensor) -> None:
    """Send rank 0's `flat` to all; when this returns it has arrived, or on a GPU is queued."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([flat], options).wait()


# ---- sending and receiving


def send(
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    outlet: Outlet,
    start: Start,
    copies: Callable[[str], int] = lambda name: 1,
) -> int:
    """Send `weights`, by public name, as an engine of `dtype` holds them.

    Args:
        copies: how many times the ranks of an engine together hold a tensor, see `over_ranks`.

    Returns:
        The fingerprint of all weights, each counted `copies` times.

    Raises:
        StaleWeights: a receiver holds other bytes than those sent, by bucket; what it holds now is not whole.
    """
    expected = 0
    for bucket in buckets(weights, dtype, outlet):
        answers = start(pickle.dumps(bucket))
        outlet.publish(bucket.nbytes)
        for rank, found in enumerate(answers()):
            if found != bucket.fingerprint:
                raise StaleWeights(
                    f"{bucket} arrived at rank {rank} with fingerprint {found:016x}, not "
                    f"{bucket.fingerprint:016x}: the transfer changed it. Load the weights again."
                )
        more = ((t, copies(name) - 1) for name, t in bucket.tensors(outlet.flat))
        expected += bucket.fingerprint + sum(n * fingerprint([t]) for t, n in more if n)
    return expected % MODULUS


def buckets(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, outlet: Outlet) -> Iterator[Bucket]:
    """Fill the outlet's buffer again and again. Receivers read each bucket before the next is asked for."""
    slots, end, index, most = list[Slot](), 0, 0, len(outlet.flat)

    def sealed() -> Bucket:
        found = fingerprint_of(outlet.flat, slots)
        return Bucket(index, tuple(slots), end, found, outlet.handle())

    for name, tensor in weights:
        held = held_in(name, dtype)
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        nbytes = tensor.numel() * held.itemsize
        if slots and begin + nbytes > most:
            yield sealed()
            slots, begin, end, index = [], 0, 0, index + 1
        if nbytes > len(outlet.flat):
            outlet.grow(nbytes)
        slot = Slot(name, held, tuple(tensor.shape), begin, nbytes)
        outlet.flat[end:begin].zero_()
        view_of(outlet.flat, slot).copy_(tensor.detach())
        slots.append(slot)
        end = begin + nbytes
    if slots:
        yield sealed()


def received(group: Group, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the rank 0 of `group` sends from a `Broadcast`, to its end. Raises `StaleWeights`: at
    the end, since the others wait for every member: a bucket is not what was sent."""
    wrong = ""
    length = torch.zeros(1, dtype=torch.int64, device=device)
    while True:
        broadcast(group, length)
        if not (size := int(length)):
            break
        message = torch.empty(size, dtype=torch.uint8, device=device)
        broadcast(group, message)
        bucket: Bucket = pickle.loads(message.cpu().numpy().tobytes())
        own = torch.empty(bucket.nbytes, dtype=torch.uint8, device=device)
        broadcast(group, own)
        if fingerprint_of(own, bucket.slots) == bucket.fingerprint:
            yield from bucket.tensors(own)
        else:
            wrong = wrong or str(bucket)
    if wrong:
        raise StaleWeights(f"{wrong} arrived with another fingerprint than was sent. Load the weights again.")


class Receiver:
    """Takes buckets in another process. It maps the sender's buffer once, until the sender has a new one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._handle: Any = None
        self._flat: Tensor | None = None

    def read(self, message: bytes) -> tuple[list[tuple[str, Tensor]], int]:
        """A bucket's tensors, copied to the device, and their fingerprint: the answer to the sender.

        No tensors where the fingerprint is not the sender's."""
        bucket: Bucket = pickle.loads(message)
        own = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self.device)
        own.copy_(self._mapped(bucket.handle)[: bucket.nbytes])
        found = fingerprint_of(own, bucket.slots)  # waits for the copy, so the sender may overwrite
        return bucket.tensors(own) if found == bucket.fingerprint else [], found

    def _mapped(self, handle: Any) -> Tensor:
        if self._flat is None or handle != self._handle:
            self.close()
            self._flat, self._handle = open_handle(handle), handle
        return self._flat

    def close(self) -> None:
        """Release the sender's buffer."""
        self._flat = self._handle = None


def open_handle(handle: Any) -> Tensor:
    """The bytes of a `SharedFile` or `SharedGpu` of another process.
    Raises `ValueError`: this process does not see the GPU."""
    if handle[0] == "file":
        return torch.from_file(handle[1], shared=True, size=handle[2], dtype=torch.uint8)
    for index in range(torch.cuda.device_count()):
        name = str(torch.cuda.get_device_properties(index).uuid)
        if name in handle[1]:
            rebuild, arguments = pickle.loads(handle[1][name])
            arguments = [*arguments[:6], index, *arguments[7:]]  # the sender's index of the GPU is not ours
            flat: Tensor = rebuild(*arguments)
            return flat
    gpu = " ".join(handle[1])
    raise ValueError(f"this process does not see the trainer's GPU {gpu}: check CUDA_VISIBLE_DEVICES")
