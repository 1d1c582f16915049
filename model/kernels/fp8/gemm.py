"""Products of FP8 matrices, dense and by expert, and their gradients: one entry each, the path by device.

DeepSeek-V3, arXiv:2412.19437, Sec. 3.3, has all three products of a linear layer in FP8 (Fig. 6). All are one
form here, `a (m c) times b (n c) transposed`, both tiled along c:

    Fprop    y  (t o) = x  (t i) . W  (o i)     1 x 128 tiles . 128 x 128 blocks
    Dgrad    dx (t i) = dy (t o) . W^T(i o)     1 x 128 tiles . 128 x 128 blocks, the same as in Fprop
    Wgrad    dW (o i) = dy^T(o t) . x^T(i t)    1 x 128 tiles of the transposes: 128 tokens share a scale

Sums run in fp32 over 128 products, then times both scales into an fp32 total (Sec. 3.3.2, "increasing
accumulation precision"). On a CPU that is emulated: dequantize, then one fp32 product, which equals the
sum of 128-long parts to fp32 rounding. On a GPU it is vendor kernels and Triton's.

Axes    t tokens, i input and o output channels, e experts, m = t k token-expert pairs sorted by expert
"""

from types import ModuleType

import torch
from torch import Tensor

from model.kernels.fp8 import blocks
from model.kernels.fp8.blocks import Quantized, dequantize


def quantize(x: Tensor, rows: int, power_of_two: bool = False) -> Quantized:
    """`x` (.. m c) to FP8, see `blocks.to_tiles`."""
    if x.is_cuda:
        return _gpu().quantize_gpu(x, rows, power_of_two)
    return blocks.to_tiles(x, rows, power_of_two)


def multiply(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """`a` (m c) times `b` (n c) transposed: (m n), in `dtype`; at most one of them in blocks."""
    if a.values.is_cuda:
        return _gpu().multiply_gpu(a, b, dtype)
    return (dequantize(a) @ dequantize(b).mT).to(dtype)


def weight_gradient(dy: Tensor, x: Quantized, dtype: torch.dtype) -> Tensor:
    """Wgrad, `dy` (t o) transposed times `x` (t i): (o i).

    `x` is what Fprop kept, in tiles of 128 channels; it is dequantized and quantized again in tiles of 128
    tokens. Its scales are powers of two, so that this costs no accuracy: with free scales a Wgrad is 4.4 %
    off, with these 3.7 %, as if `x` had been quantized once.
    """
    if dy.is_cuda:
        return _gpu().weight_gradient_gpu(dy, x, dtype)
    return multiply(blocks.to_tiles(dy.mT, 1), blocks.to_tiles(dequantize(x).mT, 1, True), dtype)


def multiply_grouped(a: Quantized, b: Quantized, counts: list[int], dtype: torch.dtype) -> Tensor:
    """Rows of `a` (m c), `counts` (e) of them an expert, times that expert's `b` (e n c): (m n)."""
    if a.values.is_cuda:
        return _gpu().multiply_grouped_gpu(a, b, counts, dtype)
    out = torch.empty(a.values.shape[0], b.values.shape[1])
    weights = dequantize(b)
    for y, rows, w in zip(out.split(counts), dequantize(a).split(counts), weights, strict=True):
        torch.mm(rows, w.mT, out=y)
    return out.to(dtype)


def weight_gradient_grouped(dy: Tensor, x: Quantized, counts: list[int], dtype: torch.dtype) -> Tensor:
    """Wgrad expert by expert, `dy` (m o), `x` (m i): (e o i). No tile of 128 tokens spans two experts."""
    if dy.is_cuda:
        return _gpu().weight_gradient_grouped_gpu(dy, x, counts, dtype)
    out = dy.new_zeros(len(counts), dy.shape[1], x.values.shape[1], dtype=dtype)
    start = 0
    for dw, count in zip(out, counts, strict=True):
        span = slice(start, start + count)
        if count:
            dw.copy_(weight_gradient(dy[span], Quantized(x.values[span], x.scale[span], 1), dtype))
        start += count
    return out


def _gpu() -> ModuleType:
    from model.kernels.fp8 import cuda  # Triton, which a CPU does not need

    return cuda
