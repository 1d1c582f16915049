"""How fast on this GPU: products in FP8 and bf16, a training step in each, decoding. Figures, no bounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from model import ModelConfig, Transformer
from model.kernels.fp8 import gemm
from model.kernels.fp8.blocks import BLOCK
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.pack import Example, mean_weights, pack
from rollout.native.engine import NativeEngine
from rollout.types import Problem, Prompt, SamplingParams
from tests.gpu.checks.compare import MEDIUM, measured, seconds

SUMMARY = "products, training steps in bf16 and FP8, decoding: tokens a second"
PRODUCTS = [(8192, 4096, 7168), (8192, 7168, 2048), (8192, 1536, 7168)]  # t o i


def run(
    device: torch.device,
    config: ModelConfig = MEDIUM,
    rows: int = 8,
    row_tokens: int = 2048,
    batch: int = 64,
    context: int = 512,
) -> dict[str, Any]:
    """Claims with bounds that only what does not run can miss; FP8 must learn what bf16 learns."""
    torch.manual_seed(0)
    claims = products(device) if device.type == "cuda" else []
    losses = {}
    for precision in ("bfloat16", "fp8"):
        figures, losses[precision] = training(device, config, precision, rows, row_tokens)
        claims += figures
    apart = abs(losses["fp8"][-1] / losses["bfloat16"][-1] - 1)
    claims.append(
        {"claim": "loss after ten steps on one batch, FP8 off bf16", "value": apart, "at_most": 0.05}
    )
    claims += decoding(device, config, batch, context)
    claims += generating(device, config, batch)
    return {"config": config.to_dict(), "losses": losses, "claims": claims}


def network(device: torch.device, config: ModelConfig) -> Transformer:
    """Fresh weights, made on the device: on the CPU 1.7B normal numbers take over a minute."""
    with device:
        return Transformer(config, seed=0)


def products(device: torch.device) -> list[dict[str, Any]]:
    """TFLOP/s of Fprop at DeepSeek-V3's widths: bf16, FP8 alone, FP8 with quantizing the activations."""
    claims = []
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
            rate = 2e-12 * t * o * i / seconds(call, device)
            claims.append(measured(f"{name} product, {t} x {o} x {i}", rate, "TFLOP/s"))
    return claims


def training(
    device: torch.device, config: ModelConfig, precision: str, rows: int, row_tokens: int
) -> tuple[list[dict[str, Any]], list[float]]:
    """Tokens a second and peak memory of an update, and the losses of ten on the same batch."""
    net = network(device, config).train()
    optim = OptimSettings(lr=1e-4, precision=precision, moments="bfloat16")  # type: ignore[arg-type]
    learner = Learner(net, optim, 1000)
    shape = (rows, row_tokens)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).numpy()
    weights = mean_weights([[True] * row_tokens] * rows)
    batch = pack([Example(i, w) for i, w in zip(ids, weights, strict=True)], 2 * row_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses = [learner.supervised_update(batch)["loss/lm"] for _ in range(10)]
    time = seconds(lambda: learner.supervised_update(batch), device, rounds=5, warmup=1)
    claims = [measured(f"training in {precision}", ids.size / time, "tokens/s")]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        claims.append(measured(f"training in {precision}: peak memory", peak, "GiB"))
    return claims, losses


@torch.no_grad()
def decoding(device: torch.device, config: ModelConfig, batch: int, context: int) -> list[dict[str, Any]]:
    """Tokens a second of the absorbed decode, all rows `context` tokens long."""
    net = network(device, config).to(torch.bfloat16).eval()
    cache = net.new_cache(batch, context + 64)
    row = torch.randint(config.vocab_size, (batch, context), device=device)
    net.prefill(row.tolist(), cache)
    time = seconds(lambda: net.head(net.decode(row[:, :1], cache)), device, rounds=20, warmup=5)
    return [measured(f"decoding, batch {batch}, context {context}", batch / time, "tokens/s")]


def generating(
    device: torch.device, config: ModelConfig, batch: int, tokens: int = 128
) -> list[dict[str, Any]]:
    """Tokens a second of the native engine as a whole, with CUDA graphs and without: prefill to sampling."""
    net = network(device, config).to(torch.bfloat16).eval()
    generator, problem = torch.Generator().manual_seed(0), Problem(id="0", kind="general", question="")
    ids = torch.randint(config.vocab_size, (batch, 64), generator=generator).tolist()
    prompts = [Prompt(problem, "none", tuple(row)) for row in ids]
    sampling = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
    claims = []
    for graphs in (True, False):
        engine = NativeEngine(net, cuda_graphs=graphs)
        time = seconds(partial(generate, engine, prompts, sampling), device, rounds=3, warmup=1)
        name = f"native engine, {batch} prompts of 64, {tokens} new, {'with' if graphs else 'no'} CUDA graphs"
        claims.append(measured(name, batch * tokens / time, "tokens/s"))
        engine.close()
    return claims


def generate(engine: NativeEngine, prompts: list[Prompt], sampling: SamplingParams) -> int:
    """Generate every rollout to its end; their number."""
    return sum(1 for _ in engine.generate(prompts, sampling))
