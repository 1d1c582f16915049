"""vLLM's sleep and its weight updates, by the calls that a recording LLM gets: no vLLM, no GPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import model as native
from rollout.collect import Plan, RolloutSource
from rollout.engine import StaleWeights
from rollout.settings import RolloutSettings
from rollout.transport import Receiver
from rollout.types import Graded, Rollout, SamplingParams
from rollout.vllm import engine as ours
from rollout.vllm.engine import VllmEngine
from rollout.weights import fingerprint

SAMPLED = SamplingParams(max_tokens=4, n=2)


def graded(rollouts):
    return [Graded(rollout, "") for rollout in rollouts]


class Recorder:
    """Stands for `vllm.LLM`: notes each call, and receives weights as a worker does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held: dict[str, int] = {}
        self.lost = 0  # added to a fingerprint: what a stale engine would report

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(f"sleep {level}" if level else f"halt {mode}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> None:
        self.calls.append("reset running" if reset_running_requests else "reset")

    def collective_rpc(self, method: str, args: tuple = ()):
        if method == "r1_begin":
            self.receiver = Receiver(torch.device("cpu"))
        if method == "r1_bucket":
            tensors, found = self.receiver.read(*args)
            self.held |= {name: fingerprint([tensor]) for name, tensor in tensors}
        if method != "r1_bucket" or self.calls[-1] != "r1_bucket":
            self.calls.append(method)
        return [found if method == "r1_bucket" else self.held | {"lost": self.lost}]


@pytest.fixture
def net(deepseek_dir):
    return native.load(deepseek_dir).eval()


@pytest.fixture
def engine(deepseek_dir, net, monkeypatch):
    """A `VllmEngine` that sleeps, around a `Recorder`; its rollouts are made up."""
    monkeypatch.setattr(ours, "cpu_build", lambda: False)
    monkeypatch.setattr(VllmEngine, "_start", lambda self, dtype: Recorder())
    settings = RolloutSettings(engine="vllm")
    settings = replace(settings, vllm=replace(settings.vllm, sleep="on", self_test=False))
    opened = VllmEngine(deepseek_dir, settings, policy=net)

    def generate(prompts, sampling, stopper):
        opened.llm.calls.append("generate")
        for i, prompt in enumerate(prompts):
            for s in range(sampling.n):
                yield Rollout(prompt, i, s, (5,), (-1.0,), "stop", opened.version)

    monkeypatch.setattr(opened, "_generate", generate)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: opened.llm.calls.append("trainer's memory"))
    return opened


UPDATE = ["trainer's memory", "wake weights", "r1_begin", "r1_bucket", "r1_end", "wake kv_cache", "reset"]


def test_a_round_sleeps_then_wakes_weights_loads_and_wakes_the_cache(engine, net, prompts):
    """The order of three steps, the middle one without an update: its weights are gone all the same."""
    source = RolloutSource(engine, lambda at, n: prompts[:n], graded, Plan(2, 2))
    for version in (0, 1, 1):
        source.next(net, version, SAMPLED)
    one = ["generate", "sleep 2"]
    assert engine.llm.calls == [*one, *UPDATE, *one, *UPDATE, *one]
    assert engine.version == 1


def test_sleep_without_a_trainer_is_refused(engine, deepseek_dir):
    """Commands and workers: there no one would wake it."""
    chosen = replace(RolloutSettings(engine="vllm"), vllm=replace(engine.settings, sleep="on"))
    with pytest.raises(ValueError, match=r"vllm\.sleep frees memory for a trainer .* set vllm\.sleep = auto"):
        VllmEngine(deepseek_dir, chosen)


def test_with_a_queue_it_never_sleeps(engine, net, prompts):
    source = RolloutSource(engine, lambda at, n: prompts[:n], graded, Plan(2, 2))
    source.next(net, 0, SAMPLED, SAMPLED)
    source.next(net, 1, SAMPLED, SAMPLED)
    source.take()
    assert not any(call.startswith(("sleep", "wake")) for call in engine.llm.calls)


@pytest.mark.parametrize("in_process", [True, False])
def test_weights_in_the_middle_of_a_request_halt_it(engine, net, in_process):
    """An engine in another process would step on half the weights; the cache of old ones is dropped."""
    engine.busy, engine.in_process = True, in_process
    engine.load_weights(net, 5)
    update = ["r1_begin", "r1_bucket", "r1_end", "reset running"]
    assert engine.llm.calls == (update if in_process else ["halt keep", *update, "wake scheduling"])


def test_no_request_before_weights_are_back(engine, net, prompts):
    assert engine.rest() and engine.rest() and engine.llm.calls == ["sleep 2"]
    with pytest.raises(StaleWeights, match="load them before the next request"):
        engine.generate(prompts, SAMPLED)
    engine.load_weights(net, 3)
    assert len(list(engine.generate(prompts, SAMPLED))) == 16 and engine.version == 3


def test_an_update_that_fails_leaves_no_engine_that_answers(engine, net, prompts, monkeypatch):
    """A stale total, then a wrong byte in the second bucket: refused until an update succeeds."""
    engine.rest()
    engine.llm.lost = 1
    with pytest.raises(StaleWeights, match="after the update to version 1 vLLM holds weights"):
        engine.load_weights(net, 1)
    engine.llm.lost = 0
    with pytest.raises(StaleWeights, match="no complete weights"):
        engine.generate(prompts, SAMPLED)
    monkeypatch.setattr(ours, "BUCKET_BYTES", 4096)
    read, index = Receiver.read, iter(range(999))

    def flipped(self, message):
        tensors, found = read(self, message)
        return ([], found + 1) if next(index) == 1 else (tensors, found)

    monkeypatch.setattr(Receiver, "read", flipped)
    with pytest.raises(StaleWeights, match=r"bucket 1 of the weights \(model\.layers.* arrived at rank 0"):
        engine.load_weights(net, 2)
    assert engine.llm.calls[-1] == "r1_end"  # the next update begins from nothing
    engine.load_weights(net, 3)
    assert len(list(engine.generate(prompts, SAMPLED))) == 16 and engine.version == 3


def test_the_policy_of_a_trainer_on_a_gpu_shares_it(engine, net, deepseek_dir, monkeypatch):
    """sleep = auto: on where the policy lies on a GPU, off where it lies elsewhere; off is off."""
    settings = RolloutSettings(engine="vllm")
    for device, sleep, expected in (("cuda", "auto", True), ("cpu", "auto", False), ("cuda", "off", False)):
        monkeypatch.setattr(ours, "device_of", lambda policy, d=device: torch.device(d))
        chosen = replace(settings, vllm=replace(settings.vllm, sleep=sleep, self_test=False))
        opened = VllmEngine(deepseek_dir, chosen, policy=net)
        assert opened.sleeps is expected and opened.seed_each is False
        assert opened.rest() is expected
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(ValueError, match=r"expandable_segments:True, which .* unset PYTORCH_CUDA"):
        VllmEngine(deepseek_dir, chosen, policy=net)


def test_a_policy_on_another_device_is_refused_by_an_engine_in_this_process(net):
    from rollout.native.engine import NativeEngine

    engine = NativeEngine(net)
    away = copy.deepcopy(net).to("meta")
    with pytest.raises(ValueError, match="generates on cpu, and the policy lies on meta"):
        engine.load_weights(away, 1)
    engine.load_weights(net, 1)
    assert engine.rest() is False and engine.version == 1
