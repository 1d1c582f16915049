"""Triton: products of FP8 matrices by expert, and by expert over the tokens for weight gradients.

A dense product is one expert. Every 128 of the contraction are summed by the tensor cores, multiplied by
both scales, and added to an fp32 total in registers: DeepSeek-V3's promotion (arXiv:2412.19437, Sec. 3.3.2).
Hopper's tensor cores keep about 14 bits while they sum FP8, so a longer sum would not be fp32.

Axes    m rows sorted by expert, n output columns, c contraction, e experts, t tokens in tiles of 128
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8.blocks import BLOCK, Quantized

ROWS, COLUMNS = 64, 128  # of a program's part of the output; 128 columns lie in one block of a weight


@triton.jit
def _rows_times_experts(
    a, a_scale, b, b_scale, out, experts, starts, ends, n, c,
    a_m, as_m, as_t, b_e, b_n, bs_e, bs_n, bs_t, out_m,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, j = tl.program_id(0), tl.program_id(1)
    e = tl.load(experts + tile).to(tl.int64)
    rows = (tl.load(starts + tile) + tl.arange(0, ROWS)).to(tl.int64)
    mine = rows < tl.load(ends + tile)
    cols = (j * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for t in range(0, tl.cdiv(c, BLOCK)):
        k = t * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(a + rows[:, None] * a_m + k[None, :], mask=mine[:, None] & (k < c)[None, :], other=0.0)
        w = tl.load(
            b + e * b_e + cols[None, :] * b_n + k[:, None],
            mask=(cols < n)[None, :] & (k < c)[:, None],
            other=0.0,
        )
        x_scale = tl.load(a_scale + rows * as_m + t * as_t, mask=mine, other=0.0)
        w_scale = tl.load(b_scale + e * bs_e + (j * COLUMNS // BLOCK) * bs_n + t * bs_t)
        total += tl.dot(x, w) * (x_scale * w_scale)[:, None]
    target = out + rows[:, None] * out_m + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mine[:, None] & (cols < n)[None, :])


@triton.jit
def _over_tokens(
    a, a_scale, b, b_scale, out, firsts, m, n, a_m, as_m, as_t, b_n, bs_n, bs_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(2)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for t in range(tl.load(firsts + e), tl.load(firsts + e + 1)):
        k = t * BLOCK + tl.arange(0, BLOCK)  # always full: the tiles are padded
        x = tl.load(a + rows[:, None] * a_m + k[None, :], mask=(rows < m)[:, None], other=0.0)
        y = tl.load(b + cols[None, :] * b_n + k[:, None], mask=(cols < n)[None, :], other=0.0)
        x_scale = tl.load(a_scale + rows * as_m + t * as_t, mask=rows < m, other=0.0)
        y_scale = tl.load(b_scale + cols * bs_n + t * bs_t, mask=cols < n, other=0.0)
        total += tl.dot(x, y) * x_scale[:, None] * y_scale[None, :]
    target = out + (e.to(tl.int64) * m + rows[:, None]) * n + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (cols < n)[None, :])


def spans(counts: list[int], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut the rows of each expert in tiles of `size`: of every tile its expert, first row and row after the
    last (int32), and of every expert its first tile (e + 1, int32)."""
    experts, starts, ends, firsts, start = [], [], [], [0], 0
    for e, count in enumerate(counts):
        for first in range(start, start + count, size):
            experts.append(e)
            starts.append(first)
            ends.append(min(first + size, start + count))
        start += count
        firsts.append(len(experts))
    flat = torch.tensor([*experts, *starts, *ends, *firsts], dtype=torch.int32).to(device, non_blocking=True)
    parts = flat.split([len(experts), len(experts), len(experts), len(firsts)])
    return parts[0], parts[1], parts[2], parts[3]


def rows_times_experts(a: Quantized, b: Quantized, counts: list[int], dtype: torch.dtype) -> Tensor:
    """Rows of `a` (m c) in tiles, `counts` (e) of them an expert, times `b` (e n c) in blocks: (m n)."""
    (m, c), n = a.values.shape, b.values.shape[1]
    out = torch.empty(m, n, dtype=dtype, device=a.values.device)
    experts, starts, ends, _ = spans(counts, ROWS, out.device)
    if len(experts):
        _rows_times_experts[(len(experts), triton.cdiv(n, COLUMNS))](
            a.values, a.scale, b.values, b.scale, out, experts, starts, ends, n, c,
            a.values.stride(0), *a.scale.stride(), *b.values.stride()[:2], *b.scale.stride(), out.stride(0),
            ROWS=ROWS, COLUMNS=COLUMNS, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def over_tokens(a: Quantized, b: Quantized, firsts: Tensor, dtype: torch.dtype) -> Tensor:
    """`a` (m t) times `b` (n t) transposed, an expert's tiles of tokens at a time: (e m n).

    `firsts` (e + 1) is the first tile of each expert; t is a multiple of the tile.
    """
    m, n, e = a.values.shape[0], b.values.shape[0], len(firsts) - 1
    out = torch.empty(e, m, n, dtype=dtype, device=a.values.device)
    _over_tokens[(triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS), e)](
        a.values, a.scale, b.values, b.scale, out, firsts, m, n,
        a.values.stride(0), *a.scale.stride(), b.values.stride(0), *b.scale.stride(),
        ROWS=ROWS, COLUMNS=COLUMNS, BLOCK=BLOCK,
    )  # fmt: skip
    return out
