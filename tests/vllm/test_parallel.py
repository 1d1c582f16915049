"""Engines of two ranks, each a process: what is live on both is proven, shards and replicas alike."""

from __future__ import annotations

import pytest
import torch
from networks import MOE, network

import model
from model.dense import DensePolicy
from rollout.engine import StaleWeights
from rollout.settings import RolloutSettings, VllmSettings
from rollout.types import SamplingParams
from rollout.vllm.self_test import compare
from rollout.weights import fingerprint
from tests import small
from tests.small import random_prompts

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def one_kv_head(seed: int) -> DensePolicy:
    """A Llama whose one key-value head both ranks need, so that they hold it twice."""
    net = small.llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    with torch.no_grad():
        net.lm_head.weight.mul_(1 - 2 * seed)
    return DensePolicy(net)


@pytest.mark.parametrize("kind", ["experts", "one kv head"])
def test_two_ranks_hold_what_was_sent(kind, tmp_path, monkeypatch):
    """A -> B -> A, each time the trainer's policy; then a rank that holds something else is noticed."""
    from rollout.vllm.engine import VllmEngine

    policies = [one_kv_head(seed) if kind == "one kv head" else network(MOE, seed) for seed in (0, 1)]
    if kind == "one kv head":
        policies[0].save(tmp_path)
    else:
        model.save(policies[0], tmp_path)
    vllm = VllmSettings(tensor_parallel=2, cache_gib=0.25)
    engine = VllmEngine(tmp_path, RolloutSettings(vllm=vllm), policy=policies[0])
    try:
        prompts = random_prompts(90, (3, 40, 1, 15))
        for version, which in enumerate((1, 0, 1), start=1):
            engine.load_weights(policies[which], version)
            if kind != "one kv head":
                assert engine.weights == fingerprint(t for _, t in policies[which].public_weights())
            found = compare(list(engine.generate(prompts, GREEDY)), policies[which])
            assert found.regret == 0 and found.worst < 1e-5
        call = engine._call

        def stale(method, *args):
            answers = call(method, *args)
            if method == "r1_end":
                answers[1]["model.norm.weight"] += 1
            return answers

        monkeypatch.setattr(engine, "_call", stale)
        with pytest.raises(StaleWeights, match="after the update to version 4 vLLM holds weights"):
            engine.load_weights(policies[0], 4)
    finally:
        engine.close()
