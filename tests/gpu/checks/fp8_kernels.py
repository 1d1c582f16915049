"""Quantization and FP8 products on the GPU against the plain code on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.kernels.fp8 import blocks, gemm
from model.kernels.fp8.blocks import Quantized, dequantize, transpose
from tests.gpu.checks.compare import at_most, relative, true

SUMMARY = "FP8 quantization, and dense and grouped products of each kind, against the CPU"
SHAPES = [(1024, 2048, 7168), (4096, 576, 7168), (37, 130, 200), (1, 256, 512), (300, 24, 576)]  # t o i
COUNTS = [[0, 300, 1, 77, 128, 0, 518], [1024, 0], [0, 0, 5]]
BOUND = 2e-3
"""Tensor cores keep about 14 bits while they add up 128 products in FP8."""


def run(
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    groups: Sequence[list[int]] = COUNTS,
    width: tuple[int, int] = (520, 776),
) -> dict[str, Any]:
    """Claims over all shapes: the worst error of each path."""
    from model.kernels.fp8 import (
        cuda,
        grouped,
        vendor,  # Triton
    )

    worst: dict[str, float] = {}

    def note(claim: str, got: Tensor, want: Tensor) -> None:
        worst[claim] = max(worst.get(claim, 0.0), relative(got, want))

    torch.manual_seed(0)
    sound = True
    for t, o, i in shapes:
        x, w, dy = torch.randn(t, i), 0.02 * torch.randn(o, i), 1e-6 * torch.randn(t, o)
        for half in (x, w.bfloat16()):
            for rows in (1, blocks.BLOCK):
                for power_of_two in (False, True):
                    want = blocks.to_tiles(half, rows, power_of_two)
                    got = cuda.quantize_gpu(half.to(device), rows, power_of_two)
                    note("quantizing: scales", got.scale, want.scale)
                    note("quantizing: values", dequantize(got), dequantize(want))
        a, b, d = (
            blocks.to_tiles(x, 1, True),
            blocks.to_tiles(w, blocks.BLOCK),
            blocks.to_tiles(dy, 1),
        )
        on = {name: _to(q, device) for name, q in (("a", a), ("b", b), ("d", d))}
        y, dx = gemm.multiply(a, b, torch.float), gemm.multiply(d, transpose(b), torch.float)
        dw = gemm.weight_gradient(dy, a, torch.float)
        note("dense Fprop", cuda.multiply_gpu(on["a"], on["b"], torch.float), y)
        note("dense Dgrad", cuda.multiply_gpu(on["d"], transpose(on["b"]), torch.float), dx)
        note("dense Wgrad", cuda.weight_gradient_gpu(dy.to(device), on["a"], torch.float), dw)
        one = Quantized(on["b"].values[None], on["b"].scale[None], blocks.BLOCK)
        note("dense Fprop by Triton", grouped.rows_times_experts(on["a"], one, [t], torch.float), y)
        library = vendor.deep_gemm() if vendor.hopper(device) else None
        if library is not None and vendor.fits_deep_gemm(on["a"], on["b"], torch.bfloat16):
            got = vendor.deep_gemm_multiply(library, on["a"], on["b"])
            note("dense Fprop by DeepGEMM, in bf16", got, y)
        x[t // 2, i // 2] = float("nan")
        spoilt = cuda.multiply_gpu(cuda.quantize_gpu(x.to(device), 1), on["b"], torch.bfloat16)
        finite = spoilt.isfinite().all(1).cpu()
        sound = sound and not finite[t // 2] and int(finite.sum()) == t - 1
    for counts in groups:
        m, e, (o, i) = sum(counts), len(counts), width
        x, w, dy = torch.randn(m, i), 0.02 * torch.randn(e, o, i), 1e-6 * torch.randn(m, o)
        a, b, d = (
            blocks.to_tiles(x, 1, True),
            blocks.to_tiles(w, blocks.BLOCK),
            blocks.to_tiles(dy, 1),
        )
        on = {name: _to(q, device) for name, q in (("a", a), ("b", b), ("d", d))}
        want = gemm.multiply_grouped(a, b, counts, torch.float)
        note("grouped Fprop", cuda.multiply_grouped_gpu(on["a"], on["b"], counts, torch.float), want)
        want = gemm.multiply_grouped(d, transpose(b), counts, torch.float)
        got = cuda.multiply_grouped_gpu(on["d"], transpose(on["b"]), counts, torch.float)
        note("grouped Dgrad", got, want)
        want = gemm.weight_gradient_grouped(dy, a, counts, torch.float)
        got = cuda.weight_gradient_grouped_gpu(dy.to(device), on["a"], counts, torch.float)
        note("grouped Wgrad", got, want)
    bounds = {"quantizing: scales": 0.0, "quantizing: values": 1e-6, "dense Fprop by DeepGEMM, in bf16": 5e-3}
    claims = [at_most(claim, value, bounds.get(claim, BOUND)) for claim, value in worst.items()]
    claims.append(true("a NaN spoils its own row and no other", sound))
    return {"shapes": list(shapes), "groups": list(groups), "claims": claims}


def _to(q: Quantized, device: torch.device) -> Quantized:
    """`q` on `device`, with the strides that the GPU's own quantization gives."""
    scale = q.scale.to(device)
    if q.rows == 1:
        scale = scale.T.contiguous().T
    return Quantized(q.values.to(device), scale, q.rows)
