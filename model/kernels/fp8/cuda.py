"""The GPU's side of `gemm`: the same five functions, over Triton and vendor kernels.

Dense products go to DeepGEMM where it is installed, else to `scaled_mm` on Hopper, else to Triton; grouped
ones to DeepGEMM or Triton; quantizing is always Triton's. Which one is decided by device and shape alone.
"""

import torch
from torch import Tensor

from model.kernels.fp8 import vendor
from model.kernels.fp8.blocks import BLOCK, Quantized
from model.kernels.fp8.grouped import over_tokens, rows_times_experts, spans
from model.kernels.fp8.quantize import square_blocks, tiles, transposed_tiles


def quantize_gpu(x: Tensor, rows: int, power_of_two: bool = False) -> Quantized:
    """`x` to FP8: (m c) in tiles for `rows` = 1, (.. m c) in blocks for 128."""
    return tiles(x, power_of_two) if rows == 1 else square_blocks(x, power_of_two)


def multiply_gpu(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """`a` (m c) in tiles times `b` (n c) in blocks, transposed: (m n)."""
    device = a.values.device
    if vendor.hopper(device) and len(a.values):
        if (library := vendor.deep_gemm()) and vendor.fits_deep_gemm(a, b, dtype):
            return vendor.deep_gemm_multiply(library, a, b)
        return vendor.scaled_mm(a, b, dtype)
    one = Quantized(vendor.contiguous(b.values)[None], b.scale[None], BLOCK)
    return rows_times_experts(a, one, [len(a.values)], dtype)


def multiply_grouped_gpu(a: Quantized, b: Quantized, counts: list[int], dtype: torch.dtype) -> Tensor:
    """Rows of `a` (m c), `counts` (e) of them an expert, times that expert's `b` (e n c): (m n)."""
    library = vendor.deep_gemm() if vendor.hopper(a.values.device) else None
    if library and vendor.fits_deep_gemm(a, b, dtype):
        return vendor.deep_gemm_grouped(library, a, b, counts)
    return rows_times_experts(a, Quantized(vendor.contiguous(b.values), b.scale, BLOCK), counts, dtype)


def weight_gradient_gpu(dy: Tensor, x: Quantized, dtype: torch.dtype) -> Tensor:
    """Wgrad, `dy` (t o) transposed times `x` (t i): (o i)."""
    if not vendor.hopper(dy.device) or not len(dy):
        return weight_gradient_grouped_gpu(dy, x, [len(dy)], dtype)[0]
    a, b, _ = _over_tokens(dy, x, [len(dy)])
    return vendor.scaled_mm(a, b, dtype)


def weight_gradient_grouped_gpu(dy: Tensor, x: Quantized, counts: list[int], dtype: torch.dtype) -> Tensor:
    """Wgrad expert by expert, `dy` (m o), `x` (m i): (e o i)."""
    return over_tokens(*_over_tokens(dy, x, counts), dtype)


def _over_tokens(dy: Tensor, x: Quantized, counts: list[int]) -> tuple[Quantized, Quantized, Tensor]:
    """Both factors in tiles of 128 tokens, none of which spans two experts, and every expert's first tile."""
    _, starts, ends, firsts = spans(counts, BLOCK, dy.device)
    a = transposed_tiles(dy, None, (starts, ends))
    return a, transposed_tiles(x.values, x.scale, (starts, ends), power_of_two=True), firsts
