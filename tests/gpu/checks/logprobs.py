"""Time and memory of the log-probabilities at a large vocabulary, by the size of their chunks.

Every chunk adds a whole fp32 gradient of the output projection, so small ones cost traffic; large ones cost
memory: the logits in fp32 and about as much again for their softmax and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from model.policy import Head
from pipeline.train import logprobs as module
from tests.gpu.checks.compare import measured, seconds

SUMMARY = "log-probabilities at a vocabulary of 152k: time and memory by the size of a chunk"
CHUNKS = (64 << 20, 256 << 20, 1 << 30, 2 << 30)
BOUND_S = 0.1
"""Forward and backward of 16k tokens: 31 TFLOP in bf16 take half of it on an H100."""


def run(
    device: torch.device,
    tokens: int = 16_384,
    hidden_size: int = 1536,
    vocab_size: int = 151_936,
    chunks: Sequence[int] = CHUNKS,
) -> dict[str, Any]:
    """Claims: seconds and peak memory for each chunk; on a GPU, a bound for the fastest."""
    generator = torch.Generator(device).manual_seed(0)
    head = nn.Linear(hidden_size, vocab_size, bias=False, device=device, dtype=torch.bfloat16)
    states = torch.randn(tokens, hidden_size, generator=generator, device=device).to(torch.bfloat16)
    states.requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), generator=generator, device=device)
    weights = torch.full((tokens,), 1 / tokens, device=device)

    def work() -> object:
        logprobs, _ = module.token_logprobs(states, Head(head.weight), targets)
        return torch.autograd.grad(weights @ logprobs, (states, head.weight))

    claims: list[dict[str, Any]] = []
    times: dict[int, float] = {}
    for chunk in chunks:
        name = f"log-probabilities of {tokens} tokens, chunks of {chunk >> 20} MiB"
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with mock.patch.dict(module.CHUNK_BYTES, {device.type: chunk}):
            times[chunk] = seconds(work, device, rounds=5, warmup=2)
        claims.append(measured(name, times[chunk], "s"))
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            claims.append(measured(f"{name}: peak memory", peak, "GiB"))
    if device.type == "cuda":
        best = min(times.values())
        claims.append(
            {"claim": "log-probabilities, fastest chunk", "value": best, "at_most": BOUND_S, "unit": "s"}
        )
    return {"tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocab_size, "claims": claims}
