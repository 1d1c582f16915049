"""The native engine on the GPU: the CPU's tokens, greedy and sampled."""

from __future__ import annotations

import copy
from typing import Any

import torch

from model import ModelConfig, Transformer
from rollout.native.engine import NativeEngine
from rollout.types import Problem, Prompt, Rollout, SamplingParams
from tests.gpu.checks.compare import SMALL, at_most, measured, true

SUMMARY = "the native engine: the same tokens and log-probabilities as on the CPU"
LENGTHS = (3, 17, 40, 9)


def run(device: torch.device, config: ModelConfig = SMALL, new_tokens: int = 48) -> dict[str, Any]:
    """Claims: greedy rollouts in fp32 equal token for token, sampled ones too; log-probabilities near."""
    cpu = Transformer(config, seed=0).eval()
    gpu = copy.deepcopy(cpu).to(device)
    engines = {
        "no graphs": NativeEngine(gpu, cuda_graphs=False),
        "graphs": NativeEngine(gpu),
        "graphs and speculation": NativeEngine(gpu, speculate=True),
    }
    claims = []
    for name, temperature, n in (("greedy", 0.0, 1), ("sampled", 1.0, 3)):
        sampling = SamplingParams(max_tokens=new_tokens, temperature=temperature, n=n, seed=5)
        want = generate(NativeEngine(cpu), config, sampling)
        for way, engine in engines.items():
            got = generate(engine, config, sampling)
            same = [a.token_ids == b.token_ids for a, b in zip(got, want, strict=True)]
            claims.append(true(f"{name}, {way}: every rollout has the CPU's tokens", all(same)))
            gaps = [
                abs(x - y)
                for a, b in zip(got, want, strict=True)
                for x, y in zip(a.logprobs, b.logprobs, strict=False)
                if a.token_ids == b.token_ids
            ]
            worst = max(gaps, default=float("inf"))
            claims.append(at_most(f"{name}, {way}: log-probabilities, nats", worst, 1e-3))
    claims += half(gpu, config, new_tokens)
    return {"new_tokens": new_tokens, "claims": claims}


def half(gpu: Transformer, config: ModelConfig, new_tokens: int) -> list[dict[str, Any]]:
    """In bf16, where graphs are captured: the first token's log-probability with graphs and without.

    Graphs round the rows up to a power of two, so products may add in another order: tokens are reported,
    not held equal.
    """
    net = copy.deepcopy(gpu).to(torch.bfloat16)
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, n=1, seed=5)
    captured, plain = NativeEngine(net), NativeEngine(net, cuda_graphs=False)
    got, want = generate(captured, config, sampling), generate(plain, config, sampling)
    on_gpu = next(net.parameters()).device.type == "cuda"
    pairs = list(zip(got, want, strict=True))
    first = [abs(a.logprobs[1] - b.logprobs[1]) for a, b in pairs if a.token_ids[:2] == b.token_ids[:2]]
    equal = sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs)
    claims = [
        at_most("bf16: first decoded token, graphs and none, nats", max(first, default=float("inf")), 0.05),
        measured("bf16: rollouts with the same tokens, graphs and none", equal, "share"),
    ]
    hopper = on_gpu and torch.cuda.get_device_capability()[0] in (9, 10)
    return (
        [*claims, true("bf16: graphs are captured on this GPU", captured.graphs is not None)]
        if hopper
        else claims
    )


def generate(engine: NativeEngine, config: ModelConfig, sampling: SamplingParams) -> list[Rollout]:
    """Rollouts of a few prompts of random tokens."""
    generator = torch.Generator().manual_seed(1)
    problem = Problem(id="0", kind="general", question="")
    prompts = [
        Prompt(problem, "none", tuple(torch.randint(config.vocab_size, (n,), generator=generator).tolist()))
        for n in LENGTHS
    ]
    rollouts = engine.generate(prompts, sampling)
    return sorted(rollouts, key=lambda rollout: (rollout.index, rollout.sample))
