"""Triton: matrices to FP8, in tiles of 1 x 128 along either axis, or in blocks of 128 x 128.

The format, and the plain code that this must equal bit for bit: `blocks`. A program owns one scale's worth of
columns, so the largest magnitude never leaves the chip. Runs in Triton's interpreter too.

Axes    m rows, c contraction (tiled), e stacked matrices
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8.blocks import AMAX_FLOOR, BLOCK, E4M3_MAX, Quantized

ROWS = 32  # of a program of the tile kernel


@triton.jit
def _to_scale(amax, bad, FLOOR: tl.constexpr, MOST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax, FLOOR), MOST)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = (((bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(amax == float("inf"), scale, up)
    # The reductions pass over NaNs, so those are counted by themselves.
    return tl.where(bad > 0, float("nan"), scale)


@triton.jit
def _to_e4m3(v, MOST: tl.constexpr):
    """fp32 to the nearest E4M3 number, ties to even, saturating. Rounded here, so that the cast is exact:
    the interpreter's own rounds ties away from zero."""
    v = tl.minimum(tl.maximum(v, -MOST), MOST)
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # 3 bits stay
    small = (v + 24576.0) - 24576.0  # 1.5 * 2^14: leaves multiples of 2^-9, the subnormals' step
    return tl.where(tl.abs(v) < 0.015625, small, normal).to(tl.float8e4nv)


@triton.jit
def _tiles(
    x, x_scale, values, scale, starts, ends, m, c,
    x_m, x_c, xs_m, xs_c, v_m, s_m, s_t, v_width,
    SEGMENTS: tl.constexpr, REQUANTIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    FLOOR: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = tl.program_id(1)
    start, end = tile * BLOCK, c
    if SEGMENTS:
        start, end = tl.load(starts + tile), tl.load(ends + tile)
    cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (rows < m)[:, None] & (cols < end)[None, :]
    v = tl.load(x + rows[:, None] * x_m + cols[None, :] * x_c, mask=inside, other=0.0).to(tl.float32)
    if REQUANTIZE:
        v *= tl.load(x_scale + (rows // BLOCK)[:, None] * xs_m + cols[None, :] * xs_c, mask=inside, other=0.0)
    bad = tl.max((v != v).to(tl.int32), axis=1)
    s = _to_scale(tl.max(tl.abs(v), axis=1), bad, FLOOR, MOST, POWER_OF_TWO)
    out = tile * BLOCK + tl.arange(0, BLOCK)
    kept = (rows < m)[:, None] & (out < v_width)[None, :]
    q = _to_e4m3(tl.div_rn(v, s[:, None]), MOST)
    tl.store(values + rows[:, None] * v_m + out[None, :], q, mask=kept)
    tl.store(scale + rows * s_m + tile * s_t, s, mask=rows < m)


@triton.jit
def _blocks(
    x, values, scale, m, c, x_e, x_m, x_c, tiles_m, tiles_c,
    POWER_OF_TWO: tl.constexpr, FLOOR: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    cols = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (rows < m)[:, None] & (cols < c)[None, :]
    v = tl.load(x + e * x_e + rows[:, None] * x_m + cols[None, :] * x_c, mask=inside, other=0.0)
    v = v.to(tl.float32)
    bad = tl.max(tl.max((v != v).to(tl.int32), axis=1), axis=0)
    s = _to_scale(tl.max(tl.max(tl.abs(v), axis=1), axis=0), bad, FLOOR, MOST, POWER_OF_TWO)
    q = _to_e4m3(tl.div_rn(v, s), MOST)
    tl.store(values + (e * m + rows[:, None]) * c + cols[None, :], q, mask=inside)
    tl.store(scale + (e * tiles_m + i) * tiles_c + j, s)


def tiles(x: Tensor, power_of_two: bool = False) -> Quantized:
    """`x` (m c), of any strides, in tiles of 1 x 128; scales (m c/128) with the rows next to each other."""
    return _launch_tiles(x, None, None, x.shape[1], -(-x.shape[1] // BLOCK), power_of_two)


def transposed_tiles(
    x: Tensor, x_scale: Tensor | None, spans: tuple[Tensor, Tensor], power_of_two: bool = False
) -> Quantized:
    """The transpose of `x` (t i), in tiles of up to 128 of its rows: values (i n*128), scales (i n).

    Args:
        x: any float; E4M3 with `x_scale`.
        x_scale: `t ceil(i/128)`, where `x` is in FP8 tiles already: dequantized on the way.
        spans: first row, and row after the last, of each of the n tiles, int32. Zeros fill a short one up.
    """
    return _launch_tiles(x.T, x_scale, spans, len(spans[0]) * BLOCK, len(spans[0]), power_of_two)


def _launch_tiles(
    x: Tensor, x_scale: Tensor | None, spans: Any, width: int, n: int, power_of_two: bool
) -> Quantized:
    m, c = x.shape
    values = torch.empty(m, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(n, m, dtype=torch.float, device=x.device).T  # strides (1, m), for `scaled_mm`
    if values.numel():
        # Of `x_scale` (t i/128) the tokens are this kernel's columns, and the channels its rows.
        xs = (x_scale.stride(1), x_scale.stride(0)) if x_scale is not None else (0, 0)
        starts, ends = spans if spans is not None else (x, x)  # not read
        _tiles[(triton.cdiv(m, ROWS), n)](
            x, x if x_scale is None else x_scale, values, scale, starts, ends, m, c,
            *x.stride(), *xs, values.stride(0), *scale.stride(), width,
            SEGMENTS=spans is not None, REQUANTIZE=x_scale is not None, POWER_OF_TWO=power_of_two,
            FLOOR=AMAX_FLOOR, MOST=E4M3_MAX, ROWS=ROWS, BLOCK=BLOCK,
        )  # fmt: skip
    return Quantized(values, scale, 1)


def square_blocks(x: Tensor, power_of_two: bool = False) -> Quantized:
    """`x` (m c) or (e m c) in blocks of 128 x 128."""
    stacked = x if x.dim() == 3 else x[None]
    e, m, c = stacked.shape
    shape = (triton.cdiv(m, BLOCK), triton.cdiv(c, BLOCK))
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(*x.shape[:-2], *shape, dtype=torch.float, device=x.device)
    _blocks[(*shape, e)](
        stacked, values, scale, m, c, *stacked.stride(), *shape,
        POWER_OF_TWO=power_of_two, FLOOR=AMAX_FLOOR, MOST=E4M3_MAX, BLOCK=BLOCK,
    )  # fmt: skip
    return Quantized(values, scale, BLOCK)
