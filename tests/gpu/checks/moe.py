"""Training a mixture of experts of 1.7B parameters in bf16 and FP8: speed, and whether FP8 learns the same.

The text is a Markov chain over few tokens, and no batch comes twice: the loss of one that is learned by heart
falls so fast that a lag hides all else. Both precisions end near the chain's entropy, where the mean loss of
the last steps compares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from model import ModelConfig, Transformer
from model.kernels.fp8 import gemm
from model.kernels.fp8.blocks import BLOCK
from model.sizes.flops import flops, peak_flops
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.pack import Batch, Example, mean_weights, pack
from tests.gpu.checks.compare import MEDIUM, measured, peak_gib, seconds

SUMMARY = "training steps in bf16 and FP8: tokens a second, memory, losses on fresh batches; products alone"
PRODUCTS = [(8192, 4096, 7168), (8192, 7168, 2048), (4096, 4096, 4096)]  # t o i
STATES, NOISE = 64, 0.25
"""Tokens of the chain; chance that a token is any of them in place of the one that follows."""
LAST = 10
NEAR = 0.05
FP8 = 1.05


def run(
    device: torch.device,
    config: ModelConfig = MEDIUM,
    steps: int = 60,
    sequences: int = 4,
    tokens: int = 1024,
    timed: tuple[int, int] = (16, 2048),
    precisions: Sequence[str] = ("bfloat16", "fp8"),
) -> dict[str, Any]:
    """Claims: figures of both precisions; losses near each other and near the chain's entropy."""
    claims = products(device) if device.type == "cuda" and "fp8" in precisions else []
    losses: dict[str, list[float]] = {}
    for precision in precisions:
        with device:  # on a CPU 1.7B normal numbers take over a minute
            net = Transformer(config, seed=0).train()
        optim = OptimSettings(
            lr=3e-4,
            warmup_steps=min(5, steps),
            precision=precision,
            moments="bfloat16",
            beta2=0.95,  # type: ignore[arg-type]
        )
        learner = Learner(net, optim, 1000)
        batches = (chain(step, sequences, tokens) for step in range(steps))
        losses[precision] = [learner.supervised_update(batch)["loss/lm"] for batch in batches]
        claims += speed(device, learner, precision, *timed)
        del learner, net
    ends = {name: float(np.mean(values[-LAST:])) for name, values in losses.items()}
    floor = entropy()
    claims.append(measured("the chain's entropy", floor, "nats"))
    claims += [measured(f"{name}: mean loss of the last steps", end, "nats") for name, end in ends.items()]
    if "fp8" in ends:
        ratio = ends["fp8"] / ends["bfloat16"]
        claims.append({"claim": "mean loss of the last steps, FP8 over bf16", "value": ratio, "at_most": FP8})
    if device.type == "cuda":
        left = (ends["bfloat16"] - floor) / (losses["bfloat16"][0] - floor)
        claims.append({"claim": "bf16: of what there is to learn, left", "value": left, "at_most": NEAR})
    return {"losses": losses, "claims": claims}


def chain(step: int, sequences: int, tokens: int) -> Batch:
    """Sequences of the chain; other ones each step."""
    follows = np.random.default_rng(0).permutation(STATES)
    rng = np.random.default_rng(step + 1)
    ids = np.empty((sequences, tokens), np.int64)
    ids[:, 0] = rng.integers(STATES, size=sequences)
    for at in range(1, tokens):
        random = rng.integers(STATES, size=sequences)
        ids[:, at] = np.where(rng.random(sequences) < NOISE, random, follows[ids[:, at - 1]])
    weights = mean_weights([[True] * tokens] * sequences)
    return pack([Example(i, w) for i, w in zip(ids, weights, strict=True)], sequences * tokens)


def entropy() -> float:
    """Nats a token of the chain, its first token left out."""
    likely = 1 - NOISE + NOISE / STATES
    return -likely * math.log(likely) - (1 - likely) * math.log(NOISE / STATES)


def speed(
    device: torch.device, learner: Learner, precision: str, sequences: int, tokens: int
) -> list[dict[str, Any]]:
    """Tokens a second, share of the peak in bf16, and memory of an update."""
    batch, times = chain(0, sequences, tokens), list[float]()
    learner.supervised_update(batch)
    memory = peak_gib(
        device,
        lambda: times.append(seconds(lambda: learner.supervised_update(batch), device, rounds=3, warmup=0)),
    )
    name, net = f"training in {precision}", learner.policy
    claims = [
        measured(name, sequences * tokens / times[0], "tokens/s"),
        measured(f"{name}: peak", memory, "GiB"),
    ]
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        share = flops(net.config, batch.lengths) / times[0] / peak
        claims.append(measured(f"{name}: MFU", share, "of bf16's peak"))
    return claims


def products(device: torch.device) -> list[dict[str, Any]]:
    """TFLOP/s of Fprop: bf16, FP8 alone, FP8 with quantizing the activations; and FP8's bound."""
    claims, rates = [], {}
    for t, o, i in PRODUCTS:
        x = torch.randn(t, i, device=device, dtype=torch.bfloat16)
        w = torch.randn(o, i, device=device, dtype=torch.bfloat16)
        a, b = gemm.quantize(x, 1, True), gemm.quantize(w, BLOCK)
        work = {
            "bf16": lambda x=x, w=w: x @ w.T,
            "FP8": lambda a=a, b=b: gemm.multiply(a, b, torch.bfloat16),
            "FP8 with quantizing": lambda x=x, b=b: gemm.multiply(
                gemm.quantize(x, 1, True), b, torch.bfloat16
            ),
        }
        for name, call in work.items():
            rates[name] = 2e-12 * t * o * i / seconds(call, device)
            claims.append(measured(f"{name} product, {t} x {o} x {i}", rates[name], "TFLOP/s"))
    ratio = rates["FP8"] / rates["bf16"]
    return [*claims, measured("FP8 over bf16, the last product", ratio, "x")]
