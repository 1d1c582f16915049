"""The cache changes the cost, not the numbers: prefill and decode against the full forward."""

import pytest
import torch
from model_shapes import BASE, SHAPES, make


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decode_equal_the_full_forward_at_every_position(shape):
    net = make(SHAPES[shape])
    tokens = torch.randint(net.config.vocab_size, (4, 40), generator=torch.Generator().manual_seed(2))
    full = net.hidden(tokens)
    lengths = torch.tensor([1, 9, 17, 4])
    rows = torch.arange(4)
    cache = net.new_cache(4, 40)
    prompts = tokens[:, :17].clone()
    prompts[torch.arange(17) >= lengths[:, None]] = 0  # what pads does not matter
    torch.testing.assert_close(
        net.prefill(prompts, lengths, cache), full[rows, lengths - 1], atol=1e-5, rtol=1e-5
    )
    for step in range(40 - 17):
        if step == 5:  # row 1 is done, row 3 becomes two
            pick = torch.tensor([3, 0, 2, 3])
            cache, rows, lengths = cache.select(pick), rows[pick], lengths[pick]
        at = lengths + step
        assert torch.equal(cache.lengths, at) and cache.longest == at.max()
        state = net.decode(tokens[rows, at], cache)
        torch.testing.assert_close(state, full[rows, at], atol=1e-5, rtol=1e-5)


def test_one_prompt_expands_into_samples_that_go_their_own_ways():
    net = make(BASE)
    prompt = torch.randint(97, (1, 6))
    cache = net.new_cache(1, 8)
    net.prefill(prompt, torch.tensor([6]), cache)
    cache = cache.select(torch.zeros(5, dtype=torch.long))
    ends = torch.arange(5)
    states = net.decode(ends, cache)
    full = net.hidden(torch.cat([prompt.expand(5, 6), ends[:, None]], dim=1))[:, -1]
    torch.testing.assert_close(states, full, atol=1e-5, rtol=1e-5)


def test_a_full_cache_and_a_cache_beyond_the_context_are_refused():
    net = make(BASE)
    cache = net.new_cache(1, 3)
    net.prefill(torch.zeros(1, 3, dtype=torch.long), torch.tensor([3]), cache)
    with pytest.raises(ValueError, match="full"):
        net.decode(torch.tensor([1]), cache)
    with pytest.raises(ValueError, match="do not fit"):
        net.prefill(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]), cache)
    with pytest.raises(ValueError, match="max_position_embeddings=128"):
        net.new_cache(1, 129)


def test_recorded_routes_replay_to_the_same_states_and_override_the_gate():
    net = make(BASE)
    tokens = torch.randint(97, (2, 12))
    cache = net.new_cache(2, 12, record_routes=True)
    net.prefill(tokens[:, :7], torch.tensor([7, 7]), cache)
    for i in range(7, 12):
        net.decode(tokens[:, i], cache)
    routes = cache.routed_experts()
    assert routes.shape == (2, 12, 2, 3) and routes.min() >= 0
    torch.testing.assert_close(net.hidden(tokens, routed_experts=routes), net.hidden(tokens))
    for moe in net.moe_layers():
        moe.gate.e_score_correction_bias.copy_(moe.gate.e_score_correction_bias.flip(0))
    replayed, fresh = net.hidden(tokens, routed_experts=routes), net.hidden(tokens)
    assert (replayed - fresh).abs().max() > 1e-2
    unrecorded = torch.full_like(routes, -1)
    torch.testing.assert_close(net.hidden(tokens, routed_experts=unrecorded), fresh)
