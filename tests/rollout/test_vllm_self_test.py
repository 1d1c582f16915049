"""The self-test that vLLM must pass, with our own engines in its place: sound, wrong, and wrong later."""

from __future__ import annotations

import pytest
import torch

import model as native
from model.dense import DensePolicy
from rollout.dense.engine import DenseEngine
from rollout.engine import StaleWeights
from rollout.local import load_policy
from rollout.native.engine import NativeEngine
from rollout.types import SamplingParams
from rollout.vllm.self_test import compare, probes, self_test


@pytest.fixture
def net(deepseek_dir):
    return native.load(deepseek_dir).eval()


@pytest.fixture
def other(deepseek_dir):
    """The same model with a head that is 5 % larger."""
    changed = native.load(deepseek_dir).eval()
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.05)
    return changed


def test_a_sound_engine_passes_with_and_without_a_reference_at_hand(net, deepseek, deepseek_dir):
    self_test(NativeEngine(net), deepseek_dir, net, torch.float32)
    self_test(NativeEngine(net), deepseek_dir, None, torch.float32)
    net.train()
    self_test(NativeEngine(native.load(deepseek_dir)), deepseek_dir, net, torch.float32)
    assert net.training  # as it was


def test_an_engine_that_computes_something_else_is_refused(net, other, deepseek_dir):
    with pytest.raises(StaleWeights, match=r"NativeEngine on .* is not our model, as loaded: over 48 greedy"):
        self_test(NativeEngine(other), deepseek_dir, net, torch.float32)


def test_an_engine_that_breaks_at_its_first_update_is_refused(net, other, deepseek_dir):
    class Breaks(NativeEngine):
        def load_weights(self, source, version):
            super().load_weights(other, version)

    with pytest.raises(StaleWeights, match="after an update with the same weights"):
        self_test(Breaks(native.load(deepseek_dir).eval()), deepseek_dir, net, torch.float32)


def test_another_token_shows_as_regret(net, deepseek_dir):
    """Log-probabilities that are right, of tokens that are not the best."""
    prompts = probes(net.config.vocab_size, net.config.max_position_embeddings)
    hot = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True, seed=3)
    found = compare(list(NativeEngine(net).generate(prompts, hot)), net, temperature=1.0)
    assert found.worst < 1e-4 and found.regret > 0.1 and found.tokens == 8 * len(prompts)
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    assert compare(list(NativeEngine(net).generate(prompts, greedy)), net).regret == 0


def test_the_reference_of_a_dense_checkpoint_is_our_adapter(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    reference = load_policy(tmp_path, torch.float32)
    self_test_prompts = probes(reference.config.vocab_size, 64)
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = compare(list(DenseEngine(DensePolicy(llama)).generate(self_test_prompts, greedy)), reference)
    assert found.worst < 1e-4 and found.regret < 1e-4
