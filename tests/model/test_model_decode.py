"""The cache changes the cost, not the numbers: prefill, decode and draft against the full forward."""

import numpy as np
import pytest
import torch
from model_shapes import BASE, SHAPES, make

from model import cache as cache_module
from model.cache import PAGE


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("new", [1, 2])
def test_prefill_and_decode_equal_the_full_forward_at_every_position(shape, new, monkeypatch):
    monkeypatch.setattr(cache_module, "CPU_BYTES", 20 << 10)  # several groups of rows, of several sizes
    net = make(SHAPES[shape])
    tokens = torch.randint(net.config.vocab_size, (4, 48), generator=torch.Generator().manual_seed(2))
    full = net.hidden(tokens).detach()
    lengths = np.array([1, 9, 17, 4])
    which = np.arange(4)  # the sequence that each row is a part of
    cache = net.new_cache(5, 48)
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    close(net.prefill(prompts, cache), full[which, lengths - 1])
    rows = np.arange(4)
    for step in range(0, 30, new):
        if step == 6:  # row 1 is done, row 3 becomes two
            cache.release(1)
            assert cache.fork(3, np.array([1]))
            rows, which = np.array([0, 1, 2, 3]), np.array([0, 3, 2, 3])
        at = cache.lengths[rows][:, None] + np.arange(new)
        state = net.decode(tokens[which[:, None], at], cache, cache.append(rows, new))
        close(state, full[which[:, None], at])


def test_long_prompts_are_read_in_pieces():
    net = make(SHAPES["q_lora"])
    tokens = torch.randint(97, (3, 100), generator=torch.Generator().manual_seed(4))
    lengths = [100, 31, 64]
    states, _ = net.hidden_and_mtp(tokens)
    full, parts = (net.new_cache(3, 101, drafts=True) for _ in range(2))
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    want = net.prefill(prompts, full)
    close(want, states[range(3), [n - 1 for n in lengths]])
    close(net.prefill(prompts, parts, chunk=30), want)
    for row, n in enumerate(lengths):  # the module's last place waits for its token
        trunk, module = parts.latent[:-1], parts.latent[-1]
        mine, theirs = parts.slots(np.array([row])), full.slots(np.array([row]))
        close(trunk[:, mine], full.latent[:-1, theirs])
        close(module[mine[: n - 1]], full.latent[-1, theirs[: n - 1]])


@pytest.mark.parametrize("shape", ["plain", "groups"])
def test_a_draft_is_what_the_mtp_module_says_in_the_full_forward(shape):
    net = make(SHAPES[shape])
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(5))
    _, (module, *_) = net.hidden_and_mtp(tokens)
    cache = net.new_cache(2, 40, drafts=True)
    rows, lengths = np.arange(2), np.array([5, 19])
    states = net.prefill([tokens[0, :5].tolist(), tokens[1, :19].tolist()], cache)
    step = cache.step(rows, lengths - 1, 1)  # the place that prefill left open
    following = tokens[rows, lengths][:, None]
    close(net.draft(states[:, None], following, cache, step)[:, 0], module[rows, lengths - 1])
    for _ in range(0, 20, 2):
        at = cache.lengths[:, None] + np.arange(2)
        step = cache.append(rows, 2)
        states = net.decode(tokens[rows[:, None], at], cache, step)
        close(net.draft(states, tokens[rows[:, None], at + 1], cache, step), module[rows[:, None], at])


def test_one_prompt_becomes_samples_that_share_its_full_pages():
    net = make(BASE)
    prompt = torch.randint(97, (1, 2 * PAGE + 3))
    cache = net.new_cache(5, 64, pages=2 + 5)
    net.prefill(prompt.tolist(), cache)
    assert cache.fork(0, np.array([1, 2, 3, 4])) and not cache.free
    ends = torch.arange(5)[:, None]
    states = net.decode(ends, cache)[:, 0]
    close(states, net.hidden(torch.cat([prompt.expand(5, -1), ends], dim=1))[:, -1])
    for row in (0, 3, 1, 4):
        cache.release(row)
    assert len(cache.free) == 4, "row 2 still holds the shared pages and its own"
    more = torch.tensor([[7]])
    states = net.decode(more, cache, cache.append(np.array([2]), 1))[:, 0]
    close(states, net.hidden(torch.cat([prompt, ends[2:3], more], dim=1))[:, -1])
    cache.release(2)
    assert sorted(cache.free) == list(range(1, 8)) and not cache.shares.any()


def test_a_full_cache_and_a_cache_beyond_the_context_are_refused():
    net = make(BASE)
    cache = net.new_cache(1, 3)
    net.prefill([[0, 0, 0]], cache)
    with pytest.raises(ValueError, match="full: a row would hold 4 of 3 tokens"):
        net.decode(torch.tensor([[1]]), cache)
    with pytest.raises(ValueError, match="full: a row would hold 4 of 3 tokens"):
        net.prefill([[0, 0, 0, 0]], net.new_cache(1, 3))
    with pytest.raises(ValueError, match="max_position_embeddings=128"):
        net.new_cache(1, 129)
    short = net.new_cache(3, 2 * PAGE, pages=2)
    with pytest.raises(ValueError, match="no page is free for a prompt of 1 tokens"):
        net.prefill([[0], [0], [0]], short)


def test_what_does_not_fit_changes_nothing():
    cache = make(BASE).new_cache(3, 4 * PAGE, pages=3)
    assert cache.reserve(np.array([0]), PAGE + 1)
    cache.lengths[0] = PAGE + 1
    before = cache.table.copy(), cache.held.copy(), list(cache.free), cache.shares.copy()
    assert not cache.reserve(np.array([0, 1]), PAGE)
    assert not cache.fork(0, np.array([1, 2]))
    after = cache.table, cache.held, cache.free, cache.shares
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_recorded_routes_replay_to_the_same_states_and_override_the_gate():
    net = make(BASE)
    tokens = torch.randint(97, (2, 20))
    cache = net.new_cache(4, 20, record_routes=True)
    net.prefill(tokens[:, :7].tolist(), cache)
    assert cache.fork(0, np.array([2])) and cache.fork(1, np.array([3]))
    rows = np.array([3, 2])
    for i in range(7, 20):
        net.decode(tokens.flip(0)[:, i : i + 1], cache, cache.append(rows, 1))
    routes = torch.stack([cache.routed_experts(2), cache.routed_experts(3)])
    assert routes.shape == (2, 20, 2, 3) and routes.min() >= 0
    torch.testing.assert_close(net.hidden(tokens, routed_experts=routes), net.hidden(tokens))
    for moe in net.moe_layers():
        moe.gate.e_score_correction_bias.copy_(moe.gate.e_score_correction_bias.flip(0))
    replayed, fresh = net.hidden(tokens, routed_experts=routes), net.hidden(tokens)
    assert (replayed - fresh).abs().max() > 1e-2
    unrecorded = torch.full_like(routes, -1, dtype=torch.int16)
    torch.testing.assert_close(net.hidden(tokens, routed_experts=unrecorded), fresh)
