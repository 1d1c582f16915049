"""What the checks share: claims, how far apart two results are, what to time, and the networks.

A check is a module of this folder with `SUMMARY`, one line, and `run(device) -> dict`. Under `claims` that
has {"claim", "value", "at_least" or "at_most", "unit"}: agreement is a claim too, of a largest error. Further
arguments are sizes, which the tests without a GPU make small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import TINY, ModelConfig
from pipeline.train.learner import PolicyObjective
from pipeline.train.losses import loss_named
from pipeline.train.pack import Example


def holds(claim: dict[str, Any]) -> bool:
    """Whether the measured value keeps its bound. NaN keeps none."""
    least, most = claim.get("at_least", -math.inf), claim.get("at_most", math.inf)
    return bool(least <= claim["value"] <= most)


def show(name: str, result: dict[str, Any]) -> None:
    """Measured value beside bound, a line a claim; what went wrong."""
    for claim in result["claims"]:
        bound = f">= {claim['at_least']:g}" if "at_least" in claim else f"<= {claim.get('at_most', 0):g}"
        value, missed = f"{claim['value']:.4g} {claim.get('unit', '')}", "" if holds(claim) else "  MISSED"
        print(f"  {claim['claim']:72} {value:>20} {bound:>10}{missed}")
    if "log" in result:
        print(result["log"])
    print(f"{name}: {result.get('seconds', 0):.0f} s", flush=True)


def relative(got: Tensor, want: Tensor) -> float:
    """Distance in share of the length of `want`; infinite where shapes differ or `got` is not finite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def at_most(claim: str, value: float, bound: float) -> dict[str, Any]:
    """The claim that an error is no larger than `bound`."""
    return {"claim": claim, "value": value, "at_most": bound, "unit": "relative"}


def true(claim: str, value: bool) -> dict[str, Any]:
    """The claim that something holds."""
    return {"claim": claim, "value": float(value), "at_least": 1.0, "unit": "(1 = yes)"}


def measured(claim: str, value: float, unit: str) -> dict[str, Any]:
    """A figure without a bound, in the same table."""
    return {"claim": claim, "value": value, "at_least": 0.0, "unit": unit}


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 10, warmup: int = 3) -> float:
    """Median seconds of `work`, the device idle before and after."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for number in range(-warmup, rounds):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        if number >= 0:
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def peak_gib(device: torch.device, work: Callable[[], object]) -> float:
    """Most memory of the GPU while `work` runs, all that lives there included; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def rollouts(vocab_size: int, lengths: Sequence[int], prompt: int = 4) -> list[Example]:
    """Random tokens as rollouts that were sampled and graded, the same every time."""
    rng = np.random.default_rng(0)
    scored, made = sum(n - prompt for n in lengths), []
    for n in lengths:
        weights = np.full(n, 1 / scored, np.float32)
        weights[:prompt] = 0
        ids, logprobs = rng.integers(3, vocab_size, n), -12 * rng.random(n, np.float32)
        made.append(Example(ids, weights, logprobs, float(rng.choice([-1.0, 1.0]))))
    return made


def objective() -> PolicyObjective:
    """GRPO as the stages have it."""
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.001}
    return PolicyObjective(loss_named("grpo"), settings, temperature=1.0)


SMALL = replace(
    TINY,
    vocab_size=512,
    hidden_size=160,
    intermediate_size=320,
    moe_intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    q_lora_rank=64,
    num_nextn_predict_layers=1,
    initializer_range=0.08,
)
"""Every part of the architecture, no size a multiple of 128."""

MEDIUM = ModelConfig(
    vocab_size=32_768,
    hidden_size=2048,
    intermediate_size=8192,
    moe_intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=4096,
    num_nextn_predict_layers=0,
)
"""Moonlight's widths, fewer layers and experts: 1.7B parameters, so that training fits one GPU of 80 GB."""
