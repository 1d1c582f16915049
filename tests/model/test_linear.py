"""The linear layer of training against plain torch, and when it takes oneDNN."""

import pytest
import torch
import torch.nn.functional as F

from model.kernels.cpu import linear
from model.kernels.cpu.linear import ROWS, Linear


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS])
def test_linear_is_that_of_torch_with_its_gradients(rows):
    torch.manual_seed(0)
    layer, x = Linear(24, 40), torch.randn(1, rows, 24, requires_grad=True)
    ours, want = layer(x), F.linear(x, layer.weight)
    torch.testing.assert_close(ours, want, atol=1e-6, rtol=1e-5)
    upstream = torch.randn_like(want)
    pairs = (torch.autograd.grad(y, (x, layer.weight), upstream) for y in (ours, want))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_onednn_gets_what_training_brings_in_fp32_alone(monkeypatch):
    assert linear.AVAILABLE  # in every torch that this project supports
    calls = []
    monkeypatch.setattr(linear, "times_transposed", lambda x, w: calls.append(x.dtype) or F.linear(x, w))
    layer, x = Linear(24, 40), torch.randn(ROWS, 24)
    layer(x).sum().backward()
    assert calls == 2 * [torch.float32]  # forward, and the input's gradient
    with torch.no_grad():
        layer(x)
    layer(x[1:])
    layer.double()(x.double())
    layer.bfloat16()(x.bfloat16())
    assert len(calls) == 2
