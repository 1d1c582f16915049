"""The complete network against the equations in float64 loops (tests/reference/deepseek_v3.py)."""

import pytest
import torch
from model_shapes import SHAPES, make

from model.checkpoint import public_tensors
from tests.reference.deepseek_v3 import forward

TOKENS = 11


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_mtp_are_the_equations(shape):
    net = make(SHAPES[shape]).eval()
    tokens = torch.randint(net.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(2))
    weights = {
        name: tensor.double() for name, tensor in public_tensors(net.state_dict(keep_vars=True), net.config)
    }
    want, want_ahead = forward(tokens.tolist(), weights, net.config.to_dict() | vars(net.config))
    hidden, states = net.hidden_and_mtp(tokens[None])
    assert want.std() > 0.1  # else the comparison would prove little
    torch.testing.assert_close(net.lm_head(hidden)[0].double(), want, atol=2e-5, rtol=1e-5)
    for k, (state, logits) in enumerate(zip(states, want_ahead, strict=True), start=1):
        ours = net.lm_head(state)[0, : TOKENS - k].double()
        torch.testing.assert_close(ours, logits, atol=2e-5, rtol=1e-5, msg=lambda m, k=k: f"MTP {k}: {m}")
