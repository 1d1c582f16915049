"""Weights that arrive during a request: completions under way go on with them, and say so."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from model import Transformer
from model.dense import DensePolicy
from rollout.dense.engine import DenseEngine
from rollout.native.engine import NativeEngine
from rollout.open import open_worker_engine
from rollout.pool.worker import Worker
from rollout.settings import RolloutSettings
from rollout.types import Rollout, SamplingParams
from tests.small import VOCAB, prompt, tiny

SAMPLED = SamplingParams(max_tokens=24, n=3, seed=5)


@pytest.fixture(scope="module")
def net():
    """With an MTP module to guess with."""
    config = tiny(VOCAB, num_nextn_predict_layers=1, eos_token_id=2, initializer_range=0.15)
    return Transformer(config, seed=0).eval()


def moved(policy):
    """The same with other weights, in every layer."""
    changed = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in changed.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape, generator=generator) if p.numel() > 1 else 0
    return changed


def renewing(engine, other, *calls):
    """`renew` that loads `other`'s weights as version 4, at these of its calls."""
    made = iter(range(10**6))

    def renew():
        now = next(made) in calls
        if now:
            engine.load_tensors(other.public_weights(), 4)
        return now

    engine.renew = renew
    return engine


def check(rollouts, logprobs):
    """Each has one token from which on its log-probabilities are those of the new weights, and the versions
    that belong to it; the number of rollouts that had both. `logprobs`: (ids, prompt, first new) -> those."""
    both = 0
    for r in rollouts:
        ids, p, n = [*r.prompt.token_ids, *r.token_ids], len(r.prompt.token_ids), len(r.token_ids)
        want = torch.tensor(r.logprobs)
        with torch.no_grad():
            fits = [s for s in range(n + 1) if torch.allclose(logprobs(ids, p, s), want, atol=2e-5)]
        assert len(fits) == 1, (r.index, r.sample, fits)
        versions = (0 if fits[0] else 4), (4 if fits[0] < n else 0)
        assert (r.policy_version, r.last_version) == versions
        both += versions == (0, 4)
    return both


def of_tokens(logits, ids, start):
    return logits.log_softmax(-1)[torch.arange(len(ids) - start), torch.tensor(ids[start:])]


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("rows", [40, 7])
def test_the_native_engine_prefills_again(net, prompts, speculate, rows):
    """Tokens after the change have the probabilities of the new weights alone, cache and guesses too."""
    other = moved(net)

    def logprobs(ids, p, s):
        each = [policy.logits(torch.tensor([ids]))[0, p - 1 : -1] for policy in (net, other)]
        return of_tokens(torch.cat([each[0][:s], each[1][s:]]), ids, p)

    engine = NativeEngine(net.frozen(), max_batch=rows, speculate=speculate)
    got = list(renewing(engine, other, 9).generate(prompts, SAMPLED))
    assert len(got) == 24 and check(got, logprobs) >= min(rows, 24) // 2
    assert engine.drain().get("rollout/preemptions") is None


def test_the_dense_engine_keeps_keys_and_values(llama, prompts):
    """Those that the old weights made stay in its cache."""
    net = DensePolicy(llama)
    other = moved(net)

    def logprobs(ids, p, s):
        cache, old = DynamicCache(config=llama.config), max(0, p + s - 1) if s else 0
        parts = [(net, ids[:old]), (other, ids[old:-1])]
        found = [
            policy.network(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True).logits[0]
            for policy, part in parts
            if part
        ]
        return of_tokens(torch.cat(found)[p - 1 :], ids, p)

    engine = DenseEngine(net.frozen(), max_batch=12)
    got = list(renewing(engine, other, 8).generate(prompts, SAMPLED))
    assert len(got) == 24 and check(got, logprobs) >= 6
    assert {r.policy_version for r in got} == {0, 4}  # the second wave began with the new ones


def test_a_request_without_new_weights_has_one_version(net, prompts):
    engine = NativeEngine(net)
    engine.version = 6
    assert {(r.policy_version, r.last_version) for r in engine.generate(prompts, SAMPLED)} == {(6, 6)}
    assert Rollout(prompt(1), 0, 0, (1,), (-1.0,), "stop", 3).last_version == 3


def test_a_worker_takes_the_newest_weights_and_no_older_ones(deepseek_dir, monkeypatch):
    worker = Worker(open_worker_engine, str(deepseek_dir), RolloutSettings(workers=1), None)
    loaded = []

    def load(refs, expected, version):
        loaded.append(version)
        worker.engine.version = version

    monkeypatch.setattr(worker, "load", load)
    assert not worker.engine.renew() and not loaded
    for version in (1, 2, 3):
        worker.send(([], 0, version))
    assert worker.engine.renew() and not worker.engine.renew() and loaded == [3]
    worker.send(([], 0, 2))
    assert not worker.engine.renew() and loaded == [3]
