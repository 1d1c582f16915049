"""How fast the native model decodes: a step by batch and context, and the engine as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from model import ModelConfig, Transformer
from rollout.native.engine import NativeEngine
from rollout.types import Problem, Prompt, SamplingParams
from tests.gpu.checks.compare import MEDIUM, measured, seconds

SUMMARY = "absorbed decoding by batch and context; the native engine with CUDA graphs and without"


def run(
    device: torch.device,
    config: ModelConfig = MEDIUM,
    batches: Sequence[int] = (64, 256),
    contexts: Sequence[int] = (512, 4000),
    tokens: int = 64,
) -> dict[str, Any]:
    """Claims: figures without bounds."""
    with device:  # on a CPU 1.7B normal numbers take over a minute
        net = Transformer(config, seed=0).to(torch.bfloat16).eval()
    claims = [step(net, device, batch, context) for batch in batches for context in contexts]
    return {"claims": [*claims, *generating(net, device, batches[0], tokens)]}


@torch.no_grad()
def step(net: Transformer, device: torch.device, batch: int, context: int) -> dict[str, Any]:
    """Tokens a second of one decode step after another, all rows with `context` random latents."""
    cache = net.new_cache(batch, context + 64)
    for row in range(batch):
        cache.reserve(np.array([row]), context)
    cache.lengths[:] = context
    cache.latent.normal_(0, 0.1)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    time = seconds(lambda: net.head(net.decode(ids, cache)), device, rounds=20, warmup=5)
    return measured(f"decoding, batch {batch}, context {context}", batch / time, "tokens/s")


def generating(net: Transformer, device: torch.device, batch: int, tokens: int) -> list[dict[str, Any]]:
    """Tokens a second of the engine, with CUDA graphs and without: prefill to sampling."""
    generator, problem = torch.Generator().manual_seed(0), Problem(id="0", kind="general", question="")
    ids = torch.randint(net.config.vocab_size, (batch, 64), generator=generator).tolist()
    prompts = [Prompt(problem, "none", tuple(row)) for row in ids]
    sampling = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
    claims = []
    for graphs in (True, False):
        engine = NativeEngine(net, cuda_graphs=graphs)
        time = seconds(partial(generate, engine, prompts, sampling), device, rounds=2, warmup=1)
        name = f"native engine, {batch} prompts of 64, {tokens} new, {'with' if graphs else 'no'} CUDA graphs"
        claims.append(measured(name, batch * tokens / time, "tokens/s"))
        engine.close()
    return claims


def generate(engine: NativeEngine, prompts: list[Prompt], sampling: SamplingParams) -> int:
    """Generate every rollout to its end; their number."""
    return sum(1 for _ in engine.generate(prompts, sampling))
