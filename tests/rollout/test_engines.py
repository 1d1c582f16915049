"""Both in-process engines against transformers' generate and against teacher forcing."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer

import model as native
from model.dense import DensePolicy
from rollout.dense import engine as dense
from rollout.dense.engine import DenseEngine, RoomyLayer
from rollout.native.engine import NativeEngine
from rollout.types import SamplingParams
from tests.small import POSITIONS, VOCAB, prompt

SAMPLED = SamplingParams(max_tokens=20, n=3, seed=11)
GREEDY = SamplingParams(max_tokens=20, temperature=0)


@pytest.fixture(scope="module", params=["native", "dense"])
def pair(request):
    """An engine class, its policy, and the transformers model with the same weights."""
    if request.param == "dense":
        llama = request.getfixturevalue("llama")
        return DenseEngine, DensePolicy(llama), llama
    net = native.load(request.getfixturevalue("deepseek_dir"), dtype=torch.float32)
    return NativeEngine, net, request.getfixturevalue("deepseek")


@pytest.fixture
def engine(pair):
    return pair[0](pair[1])


def named_rollouts(engine, prompts, params):
    """Rollouts by (index, sample)."""
    rollouts = list(engine.generate(prompts, params))
    named = {(r.index, r.sample): r for r in rollouts}
    assert len(named) == len(rollouts) == len(prompts) * params.n
    assert sorted(named) == [(i, s) for i in range(len(prompts)) for s in range(params.n)]
    assert all(r.prompt is prompts[r.index] and len(r.token_ids) == len(r.logprobs) for r in rollouts)
    return named


def tokens(rollouts):
    return {name: (tuple(r.token_ids), r.finish_reason) for name, r in rollouts.items()}


def teacher_forced(peer, rollout):
    """Raw logits (c v) at each completion token, by one forward over prompt and completion."""
    ids = [*rollout.prompt.token_ids, *rollout.token_ids]
    with torch.no_grad():
        logits = peer(input_ids=torch.tensor([ids])).logits[0]
    return logits[len(rollout.prompt.token_ids) - 1 : -1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_teacher_forcing(pair, engine, prompts, temperature):
    params = replace(SAMPLED, temperature=temperature, ignore_eos=True)
    for rollout in named_rollouts(engine, prompts, params).values():
        logits = teacher_forced(pair[2], rollout) / (temperature or 1)
        want = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids).unsqueeze(1)).squeeze(1)
        assert (torch.tensor(rollout.logprobs) - want).abs().max() < 1e-5


def test_truncated_logprobs_are_renormalized(pair, engine, prompts):
    """Top-3: the probabilities of exactly three tokens, summing to one."""
    for rollout in named_rollouts(engine, prompts, replace(SAMPLED, top_k=3)).values():
        best = teacher_forced(pair[2], rollout).topk(3)
        for step, (token, logprob) in enumerate(zip(rollout.token_ids, rollout.logprobs, strict=True)):
            at = best.indices[step].tolist().index(token)
            assert abs(best.values[step].log_softmax(-1)[at].item() - logprob) < 1e-5


def test_greedy_is_transformers_generate(pair, engine, prompts):
    for (index, _), rollout in named_rollouts(engine, prompts, GREEDY).items():
        ids = torch.tensor([prompts[index].token_ids])
        out = pair[2].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        want = out[0, ids.shape[1] :].tolist()
        assert list(rollout.token_ids) == want
        assert rollout.finish_reason == ("stop" if want[-1] == 2 else "length")


@pytest.mark.parametrize("params", [SAMPLED, GREEDY, replace(SAMPLED, top_p=0.9, top_k=40, temperature=1.3)])
def test_a_rollout_does_not_depend_on_its_company(pair, prompts, params, monkeypatch):
    """Nor on batch size, memory budget, compaction, or how many samples its prompt has."""
    kind, module, _ = pair
    params = replace(params, stop_token_ids=tuple(range(3, 12)))  # rows end at many different steps
    want = tokens(named_rollouts(kind(module), prompts, params))
    assert len({len(ids) for ids, _ in want.values()}) >= 4
    few_rows = 8 * 2**10 if kind is NativeEngine else 100 * 2**10
    for max_batch, cache_bytes in ((1, 1 << 30), (5, 1 << 30), (512, few_rows)):
        engine = kind(module, max_batch=max_batch, cache_bytes=cache_bytes)
        assert tokens(named_rollouts(engine, prompts, params)) == want
    for ratio in (0.0, 1.0):  # never compact, at every chance
        monkeypatch.setattr(dense, "KEEP_RATIO", ratio)
        assert tokens(named_rollouts(kind(module), prompts, params)) == want
    few = tokens(named_rollouts(kind(module), prompts[:3], replace(params, n=1)))
    assert few == {name: got for name, got in want.items() if name[0] < 3 and name[1] == 0}


def test_greedy_follows_prompts_when_they_move(engine, prompts):
    want = tokens(named_rollouts(engine, prompts, GREEDY))
    moved = tokens(named_rollouts(engine, prompts[::-1], GREEDY))
    assert moved == {(len(prompts) - 1 - i, s): got for (i, s), got in want.items()}


def test_samples_and_seeds_differ_and_repeat(engine, prompts):
    params = replace(SAMPLED, ignore_eos=True)
    first = tokens(named_rollouts(engine, prompts, params))
    assert len(set(first.values())) == len(first)  # the equal prompts 4 and 5 differ too
    assert tokens(named_rollouts(engine, prompts, params)) == first
    other = tokens(named_rollouts(engine, prompts, replace(params, seed=12)))
    assert not set(other.values()) & set(first.values())
    short = tokens(named_rollouts(engine, prompts, replace(params, max_tokens=7)))
    assert {name: ids for name, (ids, _) in short.items()} == {
        name: ids[:7] for name, (ids, _) in first.items()
    }


def test_stopping(pair, prompts):
    """Every row is the row that ignores eos, cut after its first stop token."""
    kind, module, _ = pair
    endless = named_rollouts(kind(module), prompts, replace(SAMPLED, ignore_eos=True))
    assert all(len(r.token_ids) == 20 and r.finish_reason == "length" for r in endless.values())
    cases = [
        (kind(module), (), {2}),
        (kind(module), (5, 9, 31), {2, 5, 9, 31}),
        (kind(module, eos_token_id=7), (), {7}),
        (kind(module, eos_token_id=[7, 8]), (9,), {7, 8, 9}),
    ]
    for engine, extra, stops in cases:
        got = named_rollouts(engine, prompts, replace(SAMPLED, stop_token_ids=extra))
        for name, rollout in endless.items():
            at = next((i for i, token in enumerate(rollout.token_ids) if token in stops), None)
            want = (rollout.token_ids, "length") if at is None else (rollout.token_ids[: at + 1], "stop")
            assert (got[name].token_ids, got[name].finish_reason) == want
    everything = named_rollouts(kind(module), prompts, replace(SAMPLED, stop_token_ids=tuple(range(VOCAB))))
    assert all(len(r.token_ids) == 1 and r.finish_reason == "stop" for r in everything.values())


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_the_position_range_caps_completions(pair, engine, prompts, ignore_eos):
    """Prompts near the range's end stop there; the others in the batch go on unharmed."""
    long = [prompt(*range(3, 3 + n)) for n in (POSITIONS - 1, POSITIONS - 5, POSITIONS - 12)]
    mixed = [*prompts, *long]
    params = replace(SAMPLED, ignore_eos=ignore_eos)
    got = named_rollouts(engine, mixed, params)
    if ignore_eos:
        room = {len(prompts): 1, len(prompts) + 1: 5, len(prompts) + 2: 12}
        assert all(len(r.token_ids) == room.get(r.index, 20) for r in got.values())
        assert all(r.finish_reason == "length" for r in got.values())
    alone = tokens(named_rollouts(engine, prompts, params))
    assert {name: value for name, value in tokens(got).items() if name in alone} == alone


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((), "prompt 1 has no tokens"),
        (range(3, 3 + POSITIONS), "prompt 1 has 64 tokens.*at most 63"),
        ((3, VOCAB), "prompt 1 has token id 97"),
        ((-1, 3), "prompt 1 has token id -1"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_generated(engine, bad, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt(3), prompt(*bad), prompt(4)], GREEDY)  # not even iterated over


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(pair, prompts, value):
    kind, module, _ = pair
    weight = module.network.get_input_embeddings().weight if kind is DenseEngine else module.head.weight
    row, saved = weight.data[50], weight.data[50].clone()
    row.fill_(value)
    try:
        with pytest.raises(FloatingPointError, match=r"decode step \d+, row \d+ \(prompt \d+, sample \d+\)"):
            list(kind(module).generate([prompt(50), prompt(50, 51)], GREEDY))
    finally:
        row.copy_(saved)


@pytest.mark.parametrize("training", [True, False])
def test_mode_comes_back_and_training_goes_on(pair, engine, prompts, training):
    _, module, _ = pair
    module.train(training)
    try:
        stream = engine.generate(prompts, replace(SAMPLED, max_tokens=3))
        for _ in zip(range(4), stream, strict=False):
            assert module.training is training
            assert torch.is_grad_enabled()
        ids = torch.tensor([prompts[3].token_ids])
        module.logits(ids).logsumexp(-1).sum().backward()
    finally:
        module.zero_grad(set_to_none=True)
        module.eval()


def test_no_prompts_no_rollouts(engine):
    assert list(engine.generate([], SAMPLED)) == []


def test_weights_are_used_in_place_and_versioned(pair, prompts):
    kind, module, _ = pair
    engine = kind(module)
    assert {r.policy_version for r in engine.generate(prompts, GREEDY)} == {0}
    before = tokens(named_rollouts(engine, prompts, GREEDY))
    head = module.head.weight
    with torch.no_grad():
        head.neg_()
    try:
        engine.load_weights(module, version=5)
        changed = named_rollouts(engine, prompts, GREEDY)
        assert {r.policy_version for r in changed.values()} == {5} and tokens(changed) != before
    finally:
        with torch.no_grad():
            head.neg_()
    engine.close()
    engine.close()


def test_dense_serves_models_with_absolute_positions(prompts):
    """Rotary models do not notice shifted positions; GPT-2 does."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(config).eval()
    for rollout in named_rollouts(
        DenseEngine(DensePolicy(gpt2)), prompts, replace(SAMPLED, ignore_eos=True)
    ).values():
        logprobs = teacher_forced(gpt2, rollout).log_softmax(-1)
        want = logprobs.gather(1, torch.tensor(rollout.token_ids).unsqueeze(1)).squeeze(1)
        assert (torch.tensor(rollout.logprobs) - want).abs().max() < 1e-5


def test_engines_agree_on_the_same_weights(deepseek, deepseek_dir, prompts):
    """Greedy, and sampled with the same seed: one loop, one stream of uniforms."""
    ours, peer = (
        NativeEngine(native.load(deepseek_dir, dtype=torch.float32)),
        DenseEngine(DensePolicy(deepseek)),
    )
    for params in (GREEDY, SAMPLED, replace(SAMPLED, top_p=0.8)):
        got, want = named_rollouts(ours, prompts, params), named_rollouts(peer, prompts, params)
        assert tokens(got) == tokens(want)
        for name, rollout in got.items():
            assert rollout.logprobs == pytest.approx(want[name].logprobs, abs=2e-5)


def test_a_cache_with_room_holds_what_transformers_own_does():
    """Prefilled, of several rows a prompt, extended past its room, and of fewer rows."""
    generator, pair = torch.Generator().manual_seed(0), (RoomyLayer(30), DynamicLayer())
    for tokens, rows in ((7, [0, 0, 1]), *[(1, None)] * 5, (1, [2, 0]), *[(1, None)] * 16):
        count = pair[1].keys.shape[0] if pair[1].is_initialized else 2
        new = [torch.randn(count, 2, tokens, 4, generator=generator) for _ in range(2)]
        for mine, theirs in zip(*(layer.update(*new) for layer in pair), strict=True):
            assert torch.equal(mine, theirs)
        for layer in pair if rows else ():
            layer.batch_select_indices(torch.tensor(rows))
    assert pair[0].room[0].shape[2] <= 30
