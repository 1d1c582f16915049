"""The network on the GPU against itself on the CPU: forward, backward, packed rows, absorbed decoding."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from model.kernels.packed import Packed
from tests.gpu.checks.compare import SMALL, at_most, relative

SUMMARY = "the network in fp32 and bf16 against fp32 on the CPU: gradients, packed rows, absorbed decoding"
LENGTHS = (5, 40, 1, 17, 30)
FP32 = 1e-4
HALF = 0.05
"""bf16 carries 8 bits, through every layer of the network."""


def run(device: torch.device, config: ModelConfig = SMALL) -> dict[str, Any]:
    """Claims: fp32 agrees to rounding, bf16 to its own; packed and absorbed forms agree on the GPU."""
    cpu = Transformer(config, seed=0)
    gpu = copy.deepcopy(cpu).to(device)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(config.vocab_size, (4, sum(LENGTHS)), generator=generator)
    on = row.to(device)
    want, got = cpu.logits(row), gpu.logits(on)
    want.log_softmax(-1)[..., 3].mean().backward()
    got.log_softmax(-1)[..., 3].mean().backward()
    claims = [at_most("fp32: logits", relative(got, want), FP32)]
    apart = [
        relative(a.grad, b.grad)
        for a, b in zip(gpu.parameters(), cpu.parameters(), strict=True)
        if a.grad is not None and b.grad is not None and b.grad.norm() > 0
    ]
    claims.append(at_most("fp32: gradients, the worst parameter", max(apart), 10 * FP32))
    with torch.no_grad():
        claims.append(at_most("fp32: packed rows, separate rows", _packed(gpu, on), FP32))
        claims.append(at_most("fp32: absorbed decoding, full forward", _decode(gpu, on), FP32))
        half = copy.deepcopy(gpu).to(torch.bfloat16)
        routes = _routes(gpu, on)  # near ties would choose other experts in bf16
        states = [net.hidden(on, routed_experts=routes) for net in (half, gpu)]
        claims.append(at_most("bf16: states, given fp32's experts", relative(*states), HALF))
    return {"lengths": LENGTHS, "claims": claims}


def _packed(net: Transformer, row: Tensor) -> float:
    """Largest distance of a packed sequence's states from its states in a row of its own."""
    layout = Packed.of(LENGTHS, row.device)
    packed = torch.cat([net.hidden(one[None], layout) for one in row])
    worst, start = 0.0, 0
    for n in LENGTHS:
        alone = net.hidden(row[:, start : start + n])
        worst = max(worst, relative(packed[:, start : start + n], alone))
        start += n
    return worst


def _decode(net: Transformer, row: Tensor) -> float:
    """Largest distance, over positions, of a decoded state from the full forward's."""
    net.eval()
    full, prompt = net.hidden(row), 8
    cache = net.new_cache(len(row), row.shape[1])
    state = net.prefill(row[:, :prompt].tolist(), cache)
    worst = relative(state, full[:, prompt - 1])
    for at in range(prompt, row.shape[1]):
        worst = max(worst, relative(net.decode(row[:, at : at + 1], cache)[:, 0], full[:, at]))
    return worst


def _routes(net: Transformer, row: Tensor) -> Tensor:
    """The experts that `net` chooses for `row` (b s): (b s moe_layers k)."""
    cache = net.new_cache(len(row), row.shape[1], record_routes=True)
    net.prefill(row.tolist(), cache)
    return torch.stack([cache.routed_experts(i) for i in range(len(row))])
