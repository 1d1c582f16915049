"""FP8 layers on the GPU: linear and experts, forward and backward, against the CPU's and against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model import ModelConfig
from model.moe import Experts
from model.scale import fp8
from tests.gpu.checks.compare import SMALL, at_most, relative, true

SUMMARY = "FP8 linear layer and experts, three products each, against the CPU and float64"
CONFIG = replace(SMALL, hidden_size=520, moe_intermediate_size=200, n_routed_experts=16)


def run(device: torch.device, config: ModelConfig = CONFIG, tokens: int = 1000) -> dict[str, Any]:
    """Claims: the same numbers as the CPU's emulation, within 4 % of exact ones, NaNs let through."""
    torch.manual_seed(0)
    x = torch.randn(tokens, config.hidden_size)
    dy = 1e-6 * torch.randn(tokens, config.hidden_size)
    linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
    experts = Experts(config)
    for weight in experts.parameters():
        nn.init.normal_(weight, 0.0, 0.05)
    ids = torch.rand(tokens, config.n_routed_experts).topk(config.num_experts_per_tok).indices
    g = torch.rand(tokens, config.num_experts_per_tok)
    claims = []
    for kind, layer, convert in (("linear", linear, fp8.Fp8Linear), ("experts", experts, fp8.Fp8Experts)):
        extra = () if kind == "linear" else (ids, g)
        exact = _products(layer.double(), x.double(), dy.double(), extra)
        emulated = _products(convert(layer.float()), x, dy, extra)
        got = _products(convert(layer.to(device)), x.to(device), dy.to(device), extra)
        half = _products(convert(layer.bfloat16()), x.to(device).bfloat16(), dy.to(device).bfloat16(), extra)
        layer.cpu().float()
        # Two products in a row: a value of the second's input may round to the next E4M3 number.
        near = 2e-3 if kind == "linear" else 1e-2
        # Each product of the experts adds its own 3.7 % to what the one before it was off.
        off = 0.04 if kind == "linear" else 0.1
        for name, a, b, c, h in zip(("y", "dx", "dW"), got, emulated, exact, half, strict=True):
            claims.append(at_most(f"{kind}: {name}, GPU and CPU emulation apart", relative(a, b), near))
            claims.append(at_most(f"{kind}: {name}, off the exact result", relative(a, c), off))
            claims.append(
                at_most(f"{kind}: {name} with bf16 inputs, off the exact result", relative(h, c), off)
            )
        broken = x.clone().to(device)
        broken[3, 5] = float("inf")
        y, _, dw = _products(convert(layer.float().to(device)), broken, dy.to(device), extra)
        layer.cpu()
        claims.append(
            true(
                f"{kind}: an infinity reaches output and weight gradient",
                bool(not y[3].isfinite().any() and not dw.isfinite().all()),
            )
        )
    return {"tokens": tokens, "claims": claims}


def _products(layer: nn.Module, x: Tensor, dy: Tensor, extra: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, gradient of `x`, gradients of the weights laid end to end."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, *(e.to(x.device) if e.dtype == torch.long else e.to(x) for e in extra))
    y.backward(dy)
    assert x.grad is not None
    weights = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    return y.detach().clone(), x.grad.clone(), weights.clone()
