"""The native engine's own: refill, shared prompts, preemption, speculation, recorded experts, memory."""

import math
from dataclasses import replace

import pytest
import torch

import model
from model import ModelConfig, Transformer, transformer
from model import cache as cache_module
from model.cache import PAGE, LatentCache
from rollout.native import engine as native
from rollout.native.engine import NativeEngine
from rollout.native.graphs import DecodeGraphs
from rollout.types import SamplingParams
from tests.small import POSITIONS, VOCAB, prompt

SAMPLED = SamplingParams(max_tokens=40, n=5, seed=3, stop_token_ids=(3, 4))
PAGE_BYTES = PAGE * 3 * 20 * 4  # three layers and an MTP module fewer or more, 16 + 4 numbers, fp32


@pytest.fixture(scope="module")
def net():
    """Two MTP modules, of which drafting uses the first."""
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=POSITIONS, eos_token_id=2,
        num_nextn_predict_layers=2, initializer_range=0.15,
    )  # fmt: skip
    return Transformer(config, seed=0).eval()


def named(rollouts):
    """Tokens, log-probabilities and ends by (index, sample): each once."""
    rollouts = list(rollouts)
    found = {(r.index, r.sample): r for r in rollouts}
    assert len(found) == len(rollouts)
    return found


def tokens(rollouts):
    return {name: (r.token_ids, r.finish_reason) for name, r in named(rollouts).items()}


@pytest.fixture(scope="module")
def plain(net, prompts):
    """Every row generated alone."""
    return named(NativeEngine(net, max_batch=1).generate(prompts, SAMPLED))


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize(
    ("max_batch", "pages", "prefill_tokens"),
    [(40, 200, 4096), (7, 60, 16), (16, 17, 20), (40, 9, 1), (3, 4, 4096), (40, 4, 8)],
)
def test_rollouts_are_the_same_whatever_the_room(
    net, prompts, plain, monkeypatch, speculate, max_batch, pages, prefill_tokens
):
    caches = []

    def kept(*args, **kwargs):
        caches.append(LatentCache(*args, **kwargs))
        return caches[-1]

    monkeypatch.setattr(transformer, "LatentCache", kept)
    engine = NativeEngine(
        net, max_batch=max_batch, cache_bytes=pages * PAGE_BYTES * (3 + speculate) // 3,
        prefill_tokens=prefill_tokens, speculate=speculate,
    )  # fmt: skip
    got = named(engine.generate(prompts, SAMPLED))
    assert tokens(got.values()) == tokens(plain.values())
    for name, rollout in got.items():
        assert rollout.logprobs == pytest.approx(plain[name].logprobs, abs=1e-5)
    (cache,) = caches
    assert (
        len(cache.free) == len(cache.shares) - 1 <= pages and not cache.shares.any() and not cache.held.any()
    )
    assert engine.stats.peak_cache_bytes <= engine.cache_bytes
    assert engine.stats.tokens == sum(len(r.token_ids) for r in got.values())
    if pages == 9 and max_batch == 40:
        assert engine.stats.preemptions > 0
    if pages == 200:
        assert engine.stats.preemptions == 0
        assert engine.stats.prefilled == sum(len(p.token_ids) for p in prompts), "a group shares its prefill"


def test_a_finished_row_is_refilled_at_once(net, prompts):
    """Eight seats: as long as samples wait, every step samples eight tokens."""
    engine = NativeEngine(net, max_batch=8)
    got = list(engine.generate(prompts, SAMPLED))
    sampled = sum(len(r.token_ids) for r in got)
    # The first token of a rollout comes with its prefill, and only the last rows leave seats empty.
    assert engine.stats.steps < (sampled - len(got)) / 8 + SAMPLED.max_tokens
    ends = [(r.index, r.sample) for r in got]
    assert ends != sorted(ends), "rollouts stream out when they end"


def oracle(right):
    """A guess from known rollouts, right where `right(position)` is true."""

    def install(monkeypatch, known):
        def guess(self, states, drafts):
            for draft in drafts:
                position = len(draft.tokens)
                want = known[draft.index, draft.sample].token_ids
                token = want[position] if position < len(want) else 0
                draft.guess = token if right(position) else (token + 1) % VOCAB

        monkeypatch.setattr(native._Run, "_guess", guess)

    return install


@pytest.mark.parametrize(
    ("right", "share"), [(lambda t: True, 1.0), (lambda t: False, 0.0), (lambda t: t % 3, 0.6)]
)
def test_right_guesses_save_steps_and_change_nothing(net, prompts, plain, monkeypatch, right, share):
    oracle(right)(monkeypatch, plain)
    engine = NativeEngine(net, max_batch=1, speculate=True)
    got = engine.generate(prompts, SAMPLED)
    assert tokens(got) == tokens(plain.values())
    assert engine.stats.acceptance() == pytest.approx(share, abs=0.25 if 0 < share < 1 else 0)
    decoded = engine.stats.tokens - len(plain)
    if share == 1:
        assert engine.stats.steps <= decoded / 2 + len(plain)
    if share == 0:
        assert engine.stats.steps == decoded


def test_guesses_are_the_mtp_modules_own(net, prompts, monkeypatch):
    """Each guess is what the first module returns in a full forward over all that was known at that time."""
    made = []
    guess = native._Run._guess

    def record(self, states, drafts):
        guess(self, states, drafts)
        made.extend(([*d.prompt.token_ids, *d.tokens], d.guess) for d in drafts)

    monkeypatch.setattr(native._Run, "_guess", record)
    greedy = SamplingParams(max_tokens=12, temperature=0, n=2)
    list(NativeEngine(net, speculate=True).generate(prompts, greedy))
    assert len(made) > 100
    for known, guessed in made:
        _, (module, _) = net.hidden_and_mtp(torch.tensor([known]))
        best = net.lm_head(module[0, -2]).topk(2)
        assert guessed == best.indices[0] or best.values[0] - best.values[1] < 1e-4


def test_speculation_reaches_the_last_position(net):
    """The last token of a row has no room for a guess behind it."""
    full = [prompt(*range(3, 3 + POSITIONS - 9)), prompt(5)]
    params = SamplingParams(max_tokens=POSITIONS, ignore_eos=True, seed=1)
    want = tokens(NativeEngine(net).generate(full, params))
    assert [len(ids) for ids, _ in want.values()] in ([9, POSITIONS - 1], [POSITIONS - 1, 9])
    assert tokens(NativeEngine(net, speculate=True).generate(full, params)) == want


def test_a_broken_module_is_named_too(net):
    weight = net.mtp[0].eh_proj.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match=r"decode step 1, row 0 \(prompt 0, sample 0\)"):
            list(NativeEngine(net, speculate=True).generate([prompt(5, 6)], SAMPLED))
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_speculation_without_a_module_is_refused(deepseek_dir):
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        NativeEngine(model.load(deepseek_dir), speculate=True)


@pytest.mark.parametrize("pages", [200, 12])
def test_recorded_experts_are_those_of_the_trainers_forward(net, prompts, pages):
    engine = NativeEngine(net, record_routes=True, speculate=True, cache_bytes=pages * PAGE * 400)
    for rollout in engine.generate(prompts, SAMPLED):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids[:-1]]])
        cache = net.new_cache(1, ids.shape[1], record_routes=True)
        net.prefill(ids.tolist(), cache)
        assert torch.equal(rollout.routed_experts.sort(-1).values, cache.routed_experts(0).sort(-1).values)
        replayed = net.hidden(ids, routed_experts=rollout.routed_experts[None])
        torch.testing.assert_close(replayed, net.hidden(ids), atol=1e-5, rtol=1e-5)
    assert (engine.stats.preemptions > 0) == (pages == 12)


def test_a_cache_too_small_for_one_rollout_is_refused_at_once(net, prompts):
    with pytest.raises(ValueError, match=r"prompt 1 with 40 new tokens needs 15,360 bytes .* allows 7,000"):
        NativeEngine(net, cache_bytes=7000).generate(prompts, SAMPLED)


def test_a_request_that_is_dropped_half_way_leaves_nothing_behind(net, prompts, plain):
    engine = NativeEngine(net, max_batch=4)
    stream = engine.generate(prompts, SAMPLED)
    for _ in range(3):
        next(stream)
    stream.close()
    assert tokens(engine.generate(prompts, SAMPLED)) == tokens(plain.values())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=2, n=20_000, temperature=0.8),
        SamplingParams(max_tokens=2, n=20_000, top_k=9),
        SamplingParams(max_tokens=2, n=20_000, top_p=0.7),
    ],
)
@pytest.mark.parametrize("speculate", [False, True])
def test_tokens_follow_the_softmax(net, params, speculate):
    """20,000 rollouts of a prompt: first tokens, and second tokens behind the commonest first one, by
    chi-square. The bound is the 0.9999 quantile by Wilson and Hilferty's formula."""
    engine = NativeEngine(net, speculate=speculate)
    got = list(engine.generate([prompt(9, 4, 33)], replace(params, ignore_eos=True)))
    first = torch.tensor([r.token_ids[0] for r in got])
    common = int(first.bincount().argmax())
    second = torch.tensor([r.token_ids[1] for r in got if r.token_ids[0] == common])
    for sampled, ids in ((first, [9, 4, 33]), (second, [9, 4, 33, common])):
        want = allowed(net.logits(torch.tensor([ids]))[0, -1].double() / params.temperature, params)
        counts = sampled.bincount(minlength=VOCAB)
        assert len(sampled) > 500 and not counts[want == 0].any()
        expected = want * len(sampled)
        rare = (want > 0) & (expected < 5)  # too few for the chi-square: counted as one
        terms = [((counts - expected) ** 2 / expected)[(want > 0) & ~rare].sum()]
        if rare.any():
            terms.append((counts[rare].sum() - expected[rare].sum()) ** 2 / expected[rare].sum())
        freedom = int(((want > 0) & ~rare).sum()) + int(rare.any()) - 1
        bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
        assert float(sum(terms)) < bound


def allowed(logits, params):
    """Probabilities by definition: softmax, cut to k, then to the nucleus, renormalized."""
    logits = logits.detach()
    order = logits.argsort(descending=True).tolist()
    order = order[: params.top_k or None]
    probs = torch.zeros_like(logits)
    probs[order] = logits[order].softmax(-1)
    covered, kept = 0.0, []
    for i in order:
        if covered >= params.top_p:
            break
        kept.append(i)
        covered += float(probs[i])
    out = torch.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


def test_padded_steps_of_graphs_change_nothing(net, prompts, plain, monkeypatch):
    """What a GPU replays from graphs, its kernels run one by one on the same padded inputs."""
    monkeypatch.setattr(cache_module, "CPU_BYTES", 1 << 40)  # as on a GPU: one group of all rows
    engine = NativeEngine(net, max_batch=11, speculate=True)
    opened = []

    def open_cache(rows, max_tokens, pages):
        cache = net.new_cache(rows, max_tokens, pages=pages, drafts=True)
        engine.graphs = DecodeGraphs(net, cache, capture=False)
        opened.append(engine.graphs)
        return cache

    monkeypatch.setattr(engine, "open_cache", open_cache)
    assert tokens(engine.generate(prompts, SAMPLED)) == tokens(plain.values())
    assert {1, 8, 16} <= {rows for rows, _, _ in opened[0].graphs} <= {1, 2, 4, 8, 16}
    assert len(opened[0].graphs) < engine.stats.steps / 2


def test_a_kept_cache_begins_empty(net, prompts, plain):
    """With graphs the next request gets the same cache."""
    engine = NativeEngine(net, max_batch=6)
    rows, pages = 7, 30
    engine.graphs = DecodeGraphs(net, net.new_cache(rows, POSITIONS, pages=pages), capture=False)
    kept = engine.graphs.cache
    stale = net.prefill([[5, 6, 7]], kept)
    assert kept.lengths[0] == 3
    cache = engine.open_cache(rows, POSITIONS, pages)
    assert cache is kept and not cache.lengths.any() and len(cache.free) == pages
    assert torch.equal(net.prefill([[5, 6, 7]], cache), stale)
    assert engine.open_cache(rows, POSITIONS, pages + 1) is not kept and engine.graphs is None
    engine.close()
