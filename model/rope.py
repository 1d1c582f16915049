"""Rotary position embedding, YaRN's stretch of it, and the softmax scale that goes with the stretch.

A pair of dimensions is a complex number, and position p turns pair i by the angle p * frequency_i:

    rotate(x, p)_i = x_i * exp(j p f_i)                 f_i = theta^(-2i / r)

Query and key are turned alike, so their product depends on the distance between them alone. YaRN divides
the slow frequencies by `factor`, keeps the fast ones, and blends linearly between; DeepSeek then sharpens
the softmax by mscale^2 (released inference code, model.py, MLA.__init__).

Papers  RoPE         arXiv:2104.09864  Eq. 34
        YaRN         arXiv:2309.00071  Sec. 3.2 (NTK-by-parts), Sec. 3.4 (attention scale)
Axes    r rotary dimensions of a head, p positions
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig


class Rope:
    """The rotations of all positions, computed once, in fp32 whatever the network's dtype.

    Not a module on purpose: `module.to(torch.bfloat16)` would round the angles, and at position 2,000
    a bf16 angle is off by several radians."""

    def __init__(self, config: ModelConfig) -> None:
        frequencies, scale = _frequencies(config)
        # On the CPU even under a default device of "meta": the table is not a weight to fill in later.
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float, device="cpu")
        angles = torch.outer(positions, frequencies)
        self.table = torch.polar(torch.full_like(angles, scale), angles)  # p r/2, complex
        self.interleave = config.rope_interleave

    def __call__(self, positions: Tensor) -> Tensor:
        """The rotations at `positions` (..): (.. r/2), complex."""
        return self.first(len(self.table), positions.device)[positions]

    def first(self, n: int, device: torch.device) -> Tensor:
        """The rotations of positions 0 to n - 1: (n r/2), complex; no copy."""
        if self.table.device != device:
            self.table = self.table.to(device)
        return self.table[:n]

    def rotate(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Turn `x` (.. r) by `rotations` (.. r/2). The result has neighbouring pairs, whatever the layout of
        `x`: the product of two vectors is the same for every order of dimensions that both share."""
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if self.interleave:
            pairs = wide.unflatten(-1, (-1, 2))  # .. r -> .. r/2 2
        else:
            pairs = wide.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * rotations).flatten(-2).to(x.dtype)

    def rotate_back(self, dy: Tensor, rotations: Tensor) -> Tensor:
        """The gradient of `rotate` by `x`, from that by its result `dy` (.. r)."""
        wide = dy if dy.dtype in (torch.float32, torch.float64) else dy.float()
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * rotations.conj()
        parts = torch.view_as_real(pairs)  # .. r/2 2
        return (parts if self.interleave else parts.transpose(-1, -2)).flatten(-2).to(dy.dtype)


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied with: 1 / sqrt(head), times YaRN's mscale squared."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn and yarn["mscale_all_dim"]:
        scale *= _mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    return scale


def _mscale(factor: float, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair (r/2), and the length the rotations multiply vectors by."""
    r, yarn = config.qk_rope_head_dim, config.rope_scaling
    steps = torch.arange(0, r, 2, dtype=torch.float, device="cpu")
    fast = 1.0 / config.rope_theta ** (steps / r)
    if yarn is None:
        return fast, 1.0
    factor = yarn["factor"]

    def pair_turning(turns: float) -> float:
        """Which pair turns `turns` times over the original context (YaRN Eq. 17 solved for the dimension)."""
        context = yarn["original_max_position_embeddings"]
        return r * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_turning(yarn["beta_slow"])), r - 1)
    ramp = ((torch.arange(r // 2, dtype=torch.float, device="cpu") - low) / max(high - low, 1e-3)).clamp(0, 1)
    if yarn["mscale"] and yarn["mscale_all_dim"]:
        length = _mscale(factor, yarn["mscale"]) / _mscale(factor, yarn["mscale_all_dim"])
    else:
        length = _mscale(factor, 1.0)
    return fast / factor * ramp + fast * (1 - ramp), length
