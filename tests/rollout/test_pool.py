"""The pool against one engine: the same rollouts, each once, whatever happens to the workers."""

from __future__ import annotations

import builtins
import copy
import os
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import model as native
from rollout.engine import EngineDied, StaleWeights
from rollout.native.engine import NativeEngine
from rollout.open import open_worker_engine
from rollout.pool import engine as workers
from rollout.pool.engine import Member, RolloutPool, Task
from rollout.pool.start import start_ray
from rollout.pool.worker import Worker
from rollout.settings import RolloutSettings
from rollout.transport import Outlet, buckets
from rollout.types import SamplingParams
from rollout.weights import fingerprint
from tests.small import VOCAB, prompt

SAMPLED = SamplingParams(max_tokens=40, n=4, seed=11)
SETTINGS = RolloutSettings(workers=2, timeout_s=60)


@pytest.fixture(scope="module")
def net(deepseek_dir):
    return native.load(deepseek_dir).eval()


@pytest.fixture(scope="module")
def other(net):
    """Another policy of the same shape."""
    changed = copy.deepcopy(net)
    with torch.no_grad():
        changed.lm_head.weight.neg_()
    return changed


@pytest.fixture(scope="module")
def pool(deepseek_dir):
    opened = RolloutPool(deepseek_dir, SETTINGS, open_worker_engine)
    yield opened
    opened.close()
    opened.close()


@pytest.fixture(autouse=True)
def counts_from_zero(request):
    if "pool" in request.fixturenames:
        request.getfixturevalue("pool").counts = workers.Counts()


def by_name(rollouts):
    named = {(r.index, r.sample): r for r in rollouts}
    assert len(named) == len(rollouts)
    return named


def check_same(got, want):
    """The same rollouts, each once; log-probabilities but for the rounding of other batches."""
    got, want = by_name(got), by_name(want)
    assert got.keys() == want.keys()
    for name, rollout in got.items():
        assert (rollout.token_ids, rollout.finish_reason) == (want[name].token_ids, want[name].finish_reason)
        assert rollout.logprobs == pytest.approx(want[name].logprobs, abs=1e-5)


def test_a_pool_returns_the_rollouts_of_one_engine(pool, net, prompts):
    got = list(pool.generate(prompts, SAMPLED))
    check_same(got, list(NativeEngine(net).generate(prompts, SAMPLED)))
    assert all(r.prompt is prompts[r.index] and r.policy_version == 0 for r in got)
    assert len(pool.counts.by_worker) == 2 and sum(pool.counts.by_worker.values()) == len(got) == 32
    assert pool.counts.replaced == pool.counts.again == pool.counts.repeated == 0
    part = replace(SAMPLED, first_index=4)
    check_same(list(pool.generate(prompts[4:6], part)), list(NativeEngine(net).generate(prompts[4:6], part)))
    assert list(pool.generate([], SAMPLED)) == []


def test_every_worker_generates_from_the_newest_weights(pool, net, other, prompts):
    for version, policy in ((1, other), (2, net), (3, other)):
        pool.load_weights(policy, version)
        got = list(pool.generate(prompts, SAMPLED))
        check_same(got, list(NativeEngine(policy).generate(prompts, SAMPLED)))
        assert {r.policy_version for r in got} == {version} and len(pool.counts.by_worker) == 2
    pool.load_weights(net, 4)


def test_a_worker_killed_in_the_middle_loses_nothing(pool, net, prompts):
    """Stopped first, so that it surely owes rollouts when it is killed; the newcomer gets the weights too."""
    pool.load_weights(net, 5)
    victim = pool.members[0]
    os.kill(victim.pid, signal.SIGSTOP)
    stream = pool.generate(prompts, SAMPLED)
    got = [next(stream)]
    assert victim.task is not None
    os.kill(victim.pid, signal.SIGKILL)
    got += list(stream)
    check_same(got, list(NativeEngine(net).generate(prompts, SAMPLED)))
    assert pool.counts.replaced == 1 and pool.counts.again >= SAMPLED.n and pool.counts.repeated == 0
    assert victim.pid not in pool.counts.by_worker and victim.pid not in {m.pid for m in pool.members}
    assert {r.policy_version for r in got} == {5} and len(pool.members) == 2


def test_a_worker_that_hangs_is_replaced(pool, net, prompts, monkeypatch):
    monkeypatch.setattr(pool, "settings", replace(SETTINGS, timeout_s=3))
    victim = pool.members[1]
    os.kill(victim.pid, signal.SIGSTOP)
    check_same(list(pool.generate(prompts, SAMPLED)), list(NativeEngine(net).generate(prompts, SAMPLED)))
    assert pool.counts.replaced == 1 and pool.counts.again >= SAMPLED.n
    with pytest.raises(ProcessLookupError):
        os.kill(victim.pid, 0)


def test_prompts_that_kill_every_worker_end_the_request(pool, prompts, monkeypatch):
    monkeypatch.setattr(workers, "MOST_FAILURES", 1)
    victim = pool.members[0]
    os.kill(victim.pid, signal.SIGSTOP)
    stream = pool.generate(prompts, SAMPLED)
    next(stream)
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(
        EngineDied, match=r"prompts 0 to 0 failed 1 times: workers were lost .*Lower rollout.workers"
    ):
        list(stream)
    monkeypatch.undo()
    assert len(list(pool.generate(prompts, SAMPLED))) == 32  # the next request finds a complete pool


def test_nan_and_wrong_weights_are_errors_and_the_pool_goes_on(pool, net, prompts):
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.lm_head.weight[50] = float("nan")
    pool.load_weights(broken, 6)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        list(pool.generate(prompts, SAMPLED))
    wrong = copy.deepcopy(net)
    wrong.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(7,\).*\(32,\)"):
        pool.load_weights(wrong, 7)
    fewer = copy.deepcopy(net)
    del fewer.layers[1]
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is missing, the engine's"):
        pool.load_weights(fewer, 7)
    pool.load_weights(net, 8)
    check_same(list(pool.generate(prompts, SAMPLED)), list(NativeEngine(net).generate(prompts, SAMPLED)))
    assert pool.counts.replaced == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [((), "prompt 1 has no tokens"), (range(3, 67), "prompt 1 has 64 tokens"), ((3, VOCAB), "token id 97")],
)
def test_bad_prompts_are_refused_before_anything_is_generated(pool, bad, message):
    with pytest.raises(ValueError, match=message):
        pool.generate([prompt(3), prompt(*bad)], SAMPLED)


def test_completions_under_way_go_on_with_new_weights(pool, net, other, prompts):
    """Weights again and again during a request: each rollout once, and it tells the versions of both ends."""
    first = pool.version + 1
    pool.load_weights(net, first)
    many = replace(SAMPLED, n=48, ignore_eos=True)
    with ThreadPoolExecutor(1) as thread:
        request = thread.submit(lambda: list(pool.generate(prompts, many)))
        while not request.done():
            time.sleep(0.02)
            pool.load_weights(other if pool.version % 2 else net, pool.version + 1)
        got = list(by_name(request.result()).values())
    assert len(got) == 8 * 48 and pool.counts == workers.Counts(by_worker=pool.counts.by_worker)
    assert all(first <= r.policy_version <= r.last_version <= pool.version for r in got)
    assert sum(r.policy_version < r.last_version for r in got) > 8
    pool.load_weights(net, pool.version + 1)
    check_same(list(pool.generate(prompts, SAMPLED)), list(NativeEngine(net).generate(prompts, SAMPLED)))


def test_rollouts_that_come_back_twice_are_passed_on_once(pool, prompts):
    member, finished = Member(None), (0, 0, (5,), (-1.0,), "stop", 3, None, 4)
    member.task = Task(2, [prompts[2]], {(2, 0)})
    (got,) = pool._accept(member, [finished, finished], prompts, deque())
    assert (got.policy_version, got.last_version) == (3, 4)
    assert pool.counts.repeated == 1 and not member.task.missing


def test_a_rollout_that_never_comes_back_ends_the_request(pool, prompts):
    part, queue = Task(2, [prompts[2]], {(2, 0)}), deque()
    for failures in range(1, workers.MOST_FAILURES):
        list(pool._accept(Member(None, task=part), None, prompts, queue))
        assert queue.pop() is part and part.failures == failures
    with pytest.raises(EngineDied, match=r"prompts 2 to 2 failed 3 times: 1 rollouts .* never came back"):
        list(pool._accept(Member(None, task=part), None, prompts, queue))


def test_a_worker_refuses_weights_that_are_not_what_was_sent(deepseek_dir, net, monkeypatch):
    """A byte that changed in the store, by bucket; and an engine that does not hold what it was sent."""
    worker = Worker(open_worker_engine, str(deepseek_dir), SETTINGS, None)
    outlet, want = Outlet(4096), fingerprint(tensor for _, tensor in net.public_weights())
    filled = buckets(net.public_weights(), torch.float32, outlet)
    sent = [(bucket, outlet.flat[: bucket.nbytes].numpy().copy()) for bucket in filled]
    monkeypatch.setattr("ray.get", lambda part: part)
    worker.load(sent, want, 1)
    with pytest.raises(StaleWeights, match=r"worker \d+ holds weights with fingerprint"):
        worker.load(sent, want + 1, 2)
    sent[2][1][9] ^= 1
    with pytest.raises(StaleWeights, match=r"bucket 2 of the weights \(model"):
        worker.load(sent, want, 3)


def test_a_broadcast_reaches_all_and_a_new_worker_waits_for_the_next(pool, net, other, prompts, monkeypatch):
    """gloo in place of NCCL. One that replaces a lost worker has no weights; the others go on without it."""
    monkeypatch.setattr(RolloutPool, "_can_broadcast", lambda self, source: True)
    first = pool.version + 1
    for version, policy in ((first, other), (first + 1, net)):
        pool.load_weights(policy, version)
        assert pool.latest is None and {m.version for m in pool.members} == {version}
        check_same(
            list(pool.generate(prompts, SAMPLED)), list(NativeEngine(policy).generate(prompts, SAMPLED))
        )
    victim = pool.members[0]
    os.kill(victim.pid, signal.SIGSTOP)
    stream = pool.generate(prompts, SAMPLED)
    got = [next(stream)]
    os.kill(victim.pid, signal.SIGKILL)
    got += list(stream)
    check_same(got, list(NativeEngine(net).generate(prompts, SAMPLED)))
    assert sorted(m.version for m in pool.members) == [0, first + 1] and pool.counts.replaced == 1
    pool.load_weights(other, first + 2)
    assert {m.version for m in pool.members} == {first + 2}
    check_same(list(pool.generate(prompts, SAMPLED)), list(NativeEngine(other).generate(prompts, SAMPLED)))


def test_with_every_worker_lost_after_a_broadcast_the_request_ends(pool, prompts, monkeypatch):
    monkeypatch.setattr(pool, "latest", None)
    monkeypatch.setattr(pool, "version", pool.version + 1)
    with pytest.raises(EngineDied, match="every worker that held the newest weights was lost"):
        list(pool.generate(prompts, SAMPLED))
    assert not pool._can_broadcast(native.load(pool.path))  # on a CPU the store is the way


@pytest.mark.parametrize(
    ("visible", "workers_", "gpus", "expected"),
    [(None, 3, 1.0, "0,2,3"), ("4,7,9", 2, 1.0, "4,9"), (None, 4, 1.0, "4 GPUs and 3 are left")],
)
def test_ray_does_not_hand_out_the_trainers_gpu(monkeypatch, visible, workers_, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = replace(SETTINGS, workers=workers_, worker_gpus=gpus)
    seen = []
    monkeypatch.setattr("ray.init", lambda **_: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    if "left" in expected:
        with pytest.raises(ValueError, match=expected):
            start_ray(settings, torch.device("cuda:1"))
    else:
        start_ray(settings, torch.device("cuda:1"))
        start_ray(replace(settings, worker_gpus=0.5), torch.device("cuda:1"))  # asks to share
        start_ray(settings, torch.device("cpu"))
        assert seen == [expected, visible, visible]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_workers_that_ask_for_absent_gpus_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=r"need 1 GPUs and torch finds 0 here: lower rollout\.worker_gpus"):
        start_ray(replace(SETTINGS, workers=2, worker_gpus=0.5), torch.device("cpu"))


def test_without_ray_it_says_what_to_install(deepseek_dir, monkeypatch):
    def refuse(name, *args, **kwargs):
        if name == "ray":
            raise ModuleNotFoundError(name)
        return found(name, *args, **kwargs)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[cluster\]'"):
        RolloutPool(deepseek_dir, SETTINGS, open_worker_engine)


@pytest.mark.parametrize(("characters", "short"), [(20, False), (36, False), (37, True), (90, True)])
def test_a_long_folder_for_temporary_files_is_not_rays(monkeypatch, characters, short):
    """Ray's sockets lie 71 characters below it, and no socket's path is longer than 107."""
    asked = {}
    monkeypatch.setattr("ray.init", lambda **options: asked.update(options))
    monkeypatch.setenv("RAY_TMPDIR", "/".ljust(characters, "x"))
    start_ray(RolloutSettings(workers=1))
    assert asked.get("_temp_dir", "") == (f"/tmp/ray-{os.getuid()}" if short else "")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    if short:
        with pytest.raises(ValueError, match=r"RAY_TMPDIR to one of at most 36 characters"):
            start_ray(RolloutSettings(workers=1))


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_tasks_of_a_fixed_size_do_not_depend_on_the_workers(workers):
    pool = object.__new__(RolloutPool)
    pool.members, pool.task_prompts = [Member(None) for _ in range(workers)], 3
    tasks = list(pool._tasks([prompt(1)] * 8, 2))
    assert [(task.first, len(task.prompts), len(task.missing)) for task in tasks] == [
        (0, 3, 6),
        (3, 3, 6),
        (6, 2, 4),
    ]
