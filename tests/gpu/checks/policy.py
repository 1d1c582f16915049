"""A dense policy of 1.5B parameters: updates, scoring, one long row, and where an update's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.dense import DensePolicy
from model.sizes.flops import flops, peak_flops
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner, score
from pipeline.train.pack import pack
from tests.gpu.checks.compare import measured, objective, peak_gib, rollouts, seconds

SUMMARY = "Qwen2.5-1.5B's shape: policy updates, scoring, one row of 32k tokens, the profile of an update"
SIZES = {
    **{"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
    **{"num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768},
    **{"rope_theta": 1e6, "tie_word_embeddings": True},
}
LEAST = 35_000
"""Tokens a second of an update: a third of an H100's peak."""
MOST_GIB = 50e9 / 2**30
"""Of the long row."""
KERNELS = 20


def run(
    device: torch.device,
    sizes: dict[str, Any] = SIZES,
    sequences: Sequence[int] = (2048,) * 64,
    micro_tokens: int = 16_384,
    long: int = 32_768,
) -> dict[str, Any]:
    """Claims: tokens a second with and without recomputed layers, of scoring; memory of the long row."""
    with device:
        policy = DensePolicy(Qwen2ForCausalLM(Qwen2Config(**sizes))).train()
    optim = OptimSettings(lr=1e-6, precision="bfloat16", moments="bfloat16", beta2=0.95, recompute=True)
    learner = Learner(policy, optim, 1000)
    examples, tokens = rollouts(sizes["vocab_size"], sequences), sum(sequences)
    work = flops(policy.config, sequences)
    peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    claims, rates = [], {}
    # Without recomputation a micro-batch of half the size fills the memory.
    for recompute, budget in ((True, micro_tokens), (False, micro_tokens // 2)):
        policy.recompute = recompute
        batch, few = (pack(some, budget) for some in (examples, examples[: max(1, budget // sequences[0])]))
        learner.policy_update(few, objective(), None, None)
        update = partial(learner.policy_update, batch, objective(), None, None)
        times: list[float] = []
        memory = peak_gib(device, lambda u=update, t=times: t.append(seconds(u, device, rounds=1, warmup=0)))
        name = f"update, micro-batches of {budget}{', recomputed' if recompute else ''}"
        rates[name] = tokens / times[0]
        claims += [measured(name, rates[name], "tokens/s"), measured(f"{name}: peak", memory, "GiB")]
        if peak:
            claims.append(measured(f"{name}: MFU", work / times[0] / peak, "of the peak"))
    parts = list(pack(examples, micro_tokens).micro_batches(device))
    time = seconds(lambda: [score(policy, part, 1.0) for part in parts], device, rounds=1, warmup=1)
    claims.append(measured("scoring", tokens / time, "tokens/s"))
    kernels = profiled(partial(learner.policy_update, few, objective(), None, None))
    policy.recompute = True
    row = pack(rollouts(sizes["vocab_size"], [long]), micro_tokens)
    memory = peak_gib(device, partial(learner.policy_update, row, objective(), None, None))
    claims.append({"claim": f"one row of {long}: peak", "value": memory, "at_most": MOST_GIB, "unit": "GiB"})
    if device.type == "cuda":
        best = max(rates.values())
        claims.append({"claim": "update, the faster", "value": best, "at_least": LEAST, "unit": "tokens/s"})
    return {"sizes": sizes, "tokens": tokens, "kernels": kernels, "claims": claims}


def profiled(work: partial[Any]) -> list[dict[str, Any]]:
    """The kernels of `work` that take most of its time, in milliseconds."""
    if ProfilerActivity.CUDA not in supported_activities():
        work()
        return []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        {"name": e.key[:120], "calls": e.count, "ms": round(e.self_device_time_total / 1e3, 3)}
        for e in events[:KERNELS]
    ]
