"""Stop strings, stop tokens and min_tokens, in both in-process engines and by themselves."""

from dataclasses import replace

import pytest
import torch

import model
from model.dense import DensePolicy
from rollout.dense.engine import DenseEngine
from rollout.native.engine import NativeEngine
from rollout.stopping import Stopper
from rollout.types import SamplingParams
from tests.small import VOCAB

SAMPLED = SamplingParams(max_tokens=25, n=4, seed=2)


@pytest.fixture(scope="module", params=["native", "dense"])
def opened(request, tokenizer):
    """An engine that reads text, and its model."""
    if request.param == "dense":
        llama = request.getfixturevalue("llama")
        policy = DensePolicy(llama)
        return DenseEngine(policy, eos_token_id=(), tokenizer=tokenizer), policy
    net = model.load(request.getfixturevalue("deepseek_dir"), dtype=torch.float32)
    return NativeEngine(net, eos_token_id=(), tokenizer=tokenizer), net


def named_rollouts(engine, prompts, params):
    return {(r.index, r.sample): r for r in engine.generate(prompts, params)}


def test_a_stop_string_ends_a_completion_at_the_token_that_completes_it(opened, prompts, tokenizer):
    engine, _ = opened
    endless = named_rollouts(engine, prompts, SAMPLED)
    texts = [tokenizer.decode(r.token_ids) for r in endless.values()]
    # Strings of two characters that some completions have somewhere, across tokens.
    found = sorted({t[i : i + 2] for t in texts[:9] for i in range(4, 8) if t[i : i + 2].isascii()} - {""})
    stops = tuple(s for s in found if len(s) == 2)[:12]
    got = named_rollouts(engine, prompts, replace(SAMPLED, stop=stops))
    cut = 0
    for name, rollout in endless.items():
        ids = rollout.token_ids
        ends = (i for i in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:i]) for s in stops))
        end = next(ends, None)
        want = (ids, "length") if end is None else (ids[:end], "stop")
        assert (got[name].token_ids, got[name].finish_reason) == want
        cut += end is not None
    assert cut >= 5


def test_min_tokens_keeps_stop_tokens_out_and_renormalizes(opened, prompts):
    engine, module = opened
    stops = tuple(range(3, 40))
    params = replace(SAMPLED, stop_token_ids=stops, min_tokens=6)
    for rollout in named_rollouts(engine, prompts, params).values():
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logits = module.logits(ids)
        logits = logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        logits[:6, 3:40] = -torch.inf
        want = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        assert (torch.tensor(rollout.logprobs) - want).abs().max() < 1e-5
        assert len(rollout.token_ids) > 6 and not set(rollout.token_ids[:6]) & set(stops)
        assert (rollout.token_ids[-1] in stops) == (rollout.finish_reason == "stop")
    assert all(len(r.token_ids) > 6 for r in named_rollouts(engine, prompts, params).values())


def test_a_stop_string_that_is_complete_before_min_tokens_does_not_count(tokenizer):
    ids = tokenizer.encode("ab ab ab", add_special_tokens=False)
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    ends = [n for n in range(1, len(ids) + 1) if texts[n].count("ab") > texts[n - 1].count("ab")]
    assert len(ends) >= 2, "the tokenizer should read this as several tokens"
    stopper = Stopper(SamplingParams(max_tokens=50, stop=("ab",), min_tokens=ends[0] + 1), None, tokenizer)
    assert [n for n in range(1, len(ids) + 1) if stopper.ends(ids[:n])] == ends[1:]
    fresh = Stopper(SamplingParams(max_tokens=50, stop=("ab",)), None, tokenizer)
    assert fresh.ends(ids[: ends[0]]) and not any(fresh.ends(ids[:n]) for n in range(1, ends[0]))


def test_a_long_stop_string_of_wide_characters_fits_the_window(tokenizer):
    """Every character is three bytes, each a token of its own."""
    string = "你好世界再见"
    ids = tokenizer.encode("x" * 40 + "龙" + string + "y", add_special_tokens=False)
    stopper = Stopper(SamplingParams(max_tokens=500, stop=(string,)), None, tokenizer)
    at = next(n for n in range(1, len(ids) + 1) if string in tokenizer.decode(ids[:n]))
    assert [n for n in range(1, at + 1) if stopper.ends(ids[:n])] == [at]


def test_ignore_eos_ignores_strings_too(opened, prompts):
    engine, _ = opened
    params = replace(SAMPLED, stop=("a", "e", " "), stop_token_ids=tuple(range(VOCAB)), ignore_eos=True)
    assert all(len(r.token_ids) == 25 for r in named_rollouts(engine, prompts, params).values())


def test_what_cannot_be_is_refused(opened, prompts):
    engine, module = opened
    blind = type(engine)(module)
    with pytest.raises(ValueError, match=r"stop strings \['ab'\] need the model's tokenizer"):
        blind.generate(prompts, replace(SAMPLED, stop=("ab",)))
    with pytest.raises(ValueError, match="min_tokens=26 must be in"):
        replace(SAMPLED, min_tokens=26)
    with pytest.raises(ValueError, match="sequence of strings"):
        replace(SAMPLED, stop="ab")
    with pytest.raises(ValueError, match="none of them empty"):
        replace(SAMPLED, stop=("ab", ""))
