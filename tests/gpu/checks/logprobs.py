"""Log-probabilities against the CPU's; their time and memory at a large vocabulary, by the size of chunks.

Every chunk adds a whole fp32 gradient of the output projection, so small ones cost traffic; large ones cost
memory: the logits, over which their gradient is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from model.policy import Head
from pipeline.train import logprobs as module
from tests.gpu.checks.compare import at_most, measured, relative, seconds

SUMMARY = (
    "log-probabilities against the CPU's; at a vocabulary of 152k time and memory by the size of a chunk"
)
CHUNKS = (64 << 20, 256 << 20, 1 << 30, 2 << 30)
BOUND_S = 0.1
"""Forward and backward of 16k tokens: 31 TFLOP in bf16 take half of it on an H100."""
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "bias, scale, soft cap": {"scale": 0.5, "softcap": 20.0}}
NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Distance of results in share of their length; in bf16 logits and gradients are rounded to three digits."""


def run(
    device: torch.device,
    tokens: int = 16_384,
    hidden_size: int = 1536,
    vocab_size: int = 151_936,
    chunks: Sequence[int] = CHUNKS,
) -> dict[str, Any]:
    """Claims: agreement; seconds and peak memory for each chunk; on a GPU, a bound for the fastest."""
    claims = agreement(device)
    generator = torch.Generator(device).manual_seed(0)
    head = nn.Linear(hidden_size, vocab_size, bias=False, device=device, dtype=torch.bfloat16)
    states = torch.randn(tokens, hidden_size, generator=generator, device=device).to(torch.bfloat16)
    states.requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), generator=generator, device=device)
    weights = torch.full((tokens,), 1 / tokens, device=device)

    def work() -> object:
        logprobs, _ = module.token_logprobs(states, Head(head.weight), targets)
        return torch.autograd.grad(weights @ logprobs, (states, head.weight))

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


def agreement(device: torch.device, tokens: int = 50, d: int = 64, v: int = 10_007) -> list[dict[str, Any]]:
    """Claims: results of small shapes on `device` and, in fp32, on the CPU; no size a multiple of a block.

    Once in one chunk that is kept, with gradients of entropies, once in chunks that are computed again. The
    first rows are peaked in fp32: targets from certain to e^-300 away."""
    generator, found = torch.Generator().manual_seed(0), list[dict[str, Any]]()
    states, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((tokens, d), (v, d), (v,)))
    targets = torch.randint(v, (tokens,), generator=generator)
    targets[:4] = torch.tensor([0, v - 1, 1, v - 2])
    onto = torch.randn(2, tokens, generator=generator)
    for dtype, near in NEAR.items():
        hidden, w = states.clone().to(dtype), (weight / 4).to(dtype)
        if dtype == torch.float32:
            hidden[0] = w[targets[0]] * 20  # the target's logit is by far the largest
            hidden[1:4] *= 10
        for kind, how in HEADS.items():
            head = [hidden, w, *([bias.to(dtype)] if how else [])]
            worst = dict.fromkeys(("log-probabilities", "entropies", "states", "head", "bias"), 0.0)
            for rows, bonus in ((tokens, True), (17, False)):
                room = mock.patch.dict(module.CHUNK_BYTES, dict.fromkeys(module.CHUNK_BYTES, 4 * v * rows))
                with room:
                    got = results(
                        [x.to(device) for x in head], how, targets.to(device), onto.to(device), bonus
                    )
                    want = results([x.float() for x in head], how, targets, onto, bonus)
                for name, mine, theirs in zip(worst, got, want, strict=False):
                    worst[name] = max(worst[name], relative(mine, theirs))
            named = f"{str(dtype).removeprefix('torch.')}, {kind}"
            found += [at_most(f"{named}: {n}", x, near) for n, x in worst.items() if n != "bias" or how]
    return found


def results(parts: list[Any], how: Any, targets: Any, onto: Any, bonus: bool) -> list[Any]:
    """Log-probabilities, entropies, and the gradients of states, head and bias."""
    parts = [x.detach().requires_grad_() for x in parts]
    head = Head(parts[1], parts[2] if how else None, **how)
    logprobs, entropy = module.token_logprobs(parts[0], head, targets, 0.7, entropy_gradient=bonus)
    loss = onto[0] @ logprobs + (onto[1] @ entropy if bonus else 0)
    return [logprobs, entropy, *torch.autograd.grad(loss, parts)]
