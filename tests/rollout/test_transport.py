"""Weights from one process to another, bucket by bucket, by a file and by a process group."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rollout.engine import StaleWeights
from rollout.transport import Broadcast, Receiver, SharedFile, buckets, join_group, received, send
from rollout.weights import fingerprint, held_in

CPU = torch.device("cpu")


def weights() -> list[tuple[str, torch.Tensor]]:
    """Tensors of all kinds: a view, odd sizes, one larger than a bucket, a bias that stays fp32."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2 + i % 5, 3 + i, generator=generator) for i in range(40)]
    made[7], made[20] = made[7].T, torch.randn(64, 64, generator=generator)
    named = [(f"layers.{i}.weight", tensor) for i, tensor in enumerate(made)]
    return [*named, ("gate.e_score_correction_bias", torch.randn(7, generator=generator))]


def as_held(dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to(held_in(name, dtype))) for name, tensor in weights()]


def child(pipe) -> None:
    """A process that knows nothing of engines: it answers each bucket, and keeps the tensors."""
    receiver, kept = Receiver(CPU), []
    while message := pipe.recv():
        tensors, found = receiver.read(message)
        kept += [(name, tensor.clone()) for name, tensor in tensors]
        pipe.send(found)
    receiver.close()
    pipe.send(pickle.dumps(kept))


@pytest.fixture
def process():
    """A child that receives; (pipe, process)."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    started = multiprocessing.get_context("spawn").Process(target=child, args=(there,))
    started.start()
    yield here
    started.kill()


def by_pipe(pipe):
    def start(message: bytes):
        pipe.send(message)
        return lambda: [pipe.recv()]

    return start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_child_process_takes_weights_by_a_file(process, tmp_path, dtype):
    """Many buckets through one small buffer, which grows for the one large tensor; nothing is left behind."""
    outlet, files = SharedFile(2048, tmp_path), set[Path]()

    def start(message: bytes):
        files.add(outlet.file)
        return by_pipe(process)(message)

    found = send(weights(), dtype, outlet, start)
    process.send(b"")
    got = pickle.loads(process.recv())
    assert [name for name, _ in got] == [name for name, _ in weights()]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, as_held(dtype), strict=True))
    assert found == fingerprint(tensor for _, tensor in as_held(dtype))
    assert len(outlet.flat) == 64 * 64 * dtype.itemsize and len(files) == 2
    outlet.close()
    assert not any(file.exists() for file in files)


def test_buckets_hold_each_tensor_once_and_no_more_than_the_buffer(tmp_path):
    outlet = SharedFile(4096, tmp_path)
    sizes, names, sums = [], [], 0
    for bucket in buckets(weights(), torch.float32, outlet):
        sizes.append(bucket.nbytes)
        names += [slot.name for slot in bucket.slots]
        sums += bucket.fingerprint
        assert [slot.offset % 16 for slot in bucket.slots] == [0] * len(bucket.slots)
    outlet.close()
    assert names == [name for name, _ in weights()] and len(sizes) > 5
    assert max(sizes) == 64 * 64 * 4 == len(outlet.flat)  # the large tensor alone
    assert sums % (1 << 64) == fingerprint(tensor for _, tensor in weights())


@pytest.mark.parametrize("at", [0, 3])
def test_a_wrong_byte_in_one_bucket_is_found_and_named(tmp_path, at):
    """Flipped after the sender has hashed, as a faulty transfer would; the bucket is not passed on."""
    outlet, receiver, passed, index = SharedFile(2048, tmp_path), Receiver(CPU), [], iter(range(99))

    def start(message: bytes):
        if next(index) == at:
            outlet.flat[5] ^= 1
        tensors, found = receiver.read(message)
        passed.append(len(tensors))
        return lambda: [found]

    with pytest.raises(
        StaleWeights, match=rf"bucket {at} of the weights \(layers\.\d+\.weight to layers\.\d+"
    ):
        send(weights(), torch.float32, outlet, start)
    outlet.close()
    assert len(passed) == at + 1 and passed[-1] == 0 and all(passed[:-1])


def test_copies_count_as_often_as_the_ranks_hold_them(tmp_path):
    outlet = SharedFile(2048, tmp_path)
    twice = {"layers.3.weight", "layers.9.weight"}
    found = send(weights(), torch.float32, outlet, lambda _: tuple, lambda name: 1 + (name in twice))
    outlet.close()
    extra = [tensor for name, tensor in weights() if name in twice]
    assert found == fingerprint([*(tensor for _, tensor in weights()), *extra])


def test_the_file_lies_in_memory_or_where_that_is_short_beside_the_checkpoint(tmp_path, monkeypatch):
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    for free, folder in ((1 << 20, memory), (60, tmp_path)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        outlet = SharedFile(100, tmp_path)
        assert outlet.file.parent == folder and outlet.file.exists()
        outlet.close()
        assert not outlet.file.exists()


def member(port: int, rank: int, world: int, pipe) -> None:
    """Takes part in two transfers; answers with the tensors, or the error."""
    group = join_group(dist.TCPStore("127.0.0.1", port, world, is_master=False), rank, world, CPU)
    for _ in range(2):
        try:
            pipe.send(pickle.dumps([(n, t.clone()) for n, t in received(group, CPU)]))
        except StaleWeights as error:
            pipe.send(str(error))


def test_a_broadcast_reaches_every_member_and_a_wrong_bucket_is_named(monkeypatch):
    """gloo here, NCCL on GPUs. The others of a group do not hang when one transfer is wrong."""
    spawn = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    pipes = [spawn.Pipe() for _ in range(2)]
    processes = [
        spawn.Process(target=member, args=(store.port, rank, 3, there))
        for rank, (_, there) in enumerate(pipes, 1)
    ]
    try:
        for process in processes:
            process.start()
        group = join_group(store, 0, 3, CPU)
        outlet = Broadcast(2048, CPU, group)
        found = send(weights(), torch.bfloat16, outlet, outlet.start)
        outlet.close()
        for here, _ in pipes:
            got = pickle.loads(here.recv())
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, as_held(torch.bfloat16), strict=True))
        assert found == fingerprint(tensor for _, tensor in as_held(torch.bfloat16))

        outlet, publish = Broadcast(2048, CPU, group), Broadcast.publish

        def flipped(self, nbytes: int) -> None:
            self.flat[5] ^= nbytes > 1900
            publish(self, nbytes)

        monkeypatch.setattr(Broadcast, "publish", flipped)
        send(weights(), torch.bfloat16, outlet, outlet.start)
        outlet.close()
        for here, _ in pipes:
            assert "bucket 0 of the weights (layers.0.weight to layers" in here.recv()
    finally:
        for process in processes:
            process.kill()
