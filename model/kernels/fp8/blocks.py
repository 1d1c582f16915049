"""The FP8 format of DeepSeek-V3: E4M3 values with one fp32 scale a tile, in plain torch.

DeepSeek-V3, arXiv:2412.19437, Sec. 3.3.2. Activations have a scale a token and 128 channels (a tile of
1 x 128), weights one for 128 output and 128 input channels (a block of 128 x 128), taken when they are
quantized from the largest magnitude in the tile ("online"):

    scale = max(|tile|) / 448        value = e4m3(tile / scale)        tile ~ value * scale

A tile that holds a NaN or an infinity gets a scale that is not finite, so everything read from it is not
finite either: saturation never hides a divergence.

Axes    m rows, c contraction, both of any length; tiles at the ragged end are smaller
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-12
"""Least magnitude that a scale is made for. Gradients of 1e-7 are common: a floor of 1e-4 flushes them."""
ALL_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Quantized(NamedTuple):
    """A matrix in FP8, tiled along its last axis, which is the one that a product sums over."""

    values: Tensor  # .. m c, float8_e4m3fn
    scale: Tensor  # .. m ceil(c / 128), or .. ceil(m / 128) ceil(c / 128); fp32, multiplied to dequantize
    rows: int  # of a tile: 1 or 128


def to_tiles(x: Tensor, rows: int, power_of_two: bool = False) -> Quantized:
    """`x` (.. m c) in tiles of `rows` x 128.

    Args:
        rows: 1 for activations and gradients, 128 for weights.
        power_of_two: round scales up to powers of two. Quantizing the result again along the other axis is
            then free of error, but for what falls below E4M3's smallest step (Sec. 3.3.3).
    """
    m, c = x.shape[-2:]
    x = x.float().contiguous()
    tiles = F.pad(x, (0, -c % BLOCK, 0, -m % rows)) if c % BLOCK or m % rows else x
    tiles = tiles.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))  # .. m/rows rows c/128 128
    scale = to_scale(tiles.abs().amax((-3, -1)), power_of_two)  # .. m/rows c/128
    values = (tiles / scale[..., :, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Quantized(values.flatten(-4, -3).flatten(-2)[..., :m, :c].contiguous(), scale, rows)


def to_scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """Scales for tiles whose largest magnitudes are `amax` (any shape), fp32."""
    scale = amax.float().clamp(min=AMAX_FLOOR) / E4M3_MAX
    if not power_of_two:
        return scale
    # Up to the next power of two: carry any bit of the mantissa into the exponent.
    up = (((scale.view(torch.int32) + 0x7FFFFF) >> 23) << 23).view(torch.float)
    return torch.where(scale.isfinite(), up, scale)


def dequantize(q: Quantized) -> Tensor:
    """The matrix (.. m c) that `q` stands for, fp32."""
    m, c = q.values.shape[-2:]
    tiles = widen(q.values)
    if c % BLOCK or m % q.rows:
        tiles = F.pad(tiles, (0, -c % BLOCK, 0, -m % q.rows))
    tiles = tiles.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, q.rows))
    tiles = tiles * q.scale[..., :, None, :, None]
    return tiles.flatten(-4, -3).flatten(-2)[..., :m, :c]


def widen(values: Tensor) -> Tensor:
    """E4M3 `values` as fp32. On a CPU by a table of all 256: torch's own conversion takes twice as long."""
    if values.device.type != "cpu":
        return values.float()
    return ALL_E4M3.take(values.view(torch.uint8).long())


def transpose(q: Quantized) -> Quantized:
    """`q` (.. m c), in 128 x 128 blocks, with its last two axes swapped: no error, nothing is requantized."""
    assert q.rows == BLOCK, "tiles of one row cannot be transposed"
    return Quantized(q.values.mT, q.scale.mT, BLOCK)
