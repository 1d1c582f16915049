"""The two small layers that everything else is made of: RMSNorm and the gated feed-forward.

Papers  RMSNorm  arXiv:1910.07467  Eq. 4
        SwiGLU   arXiv:2002.05202  Eq. 6
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear


class _RMSNorm(torch.autograd.Function):
    """RMSNorm of `x` (.. d) for CPUs, in a third of the passes over memory that autograd's own takes.

    y = r x w       r = 1 / sqrt(mean x^2 + eps)       dx = r (dy w - x r^2 mean(dy w x))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        shape = x.shape
        x, dy, w = (tensor.to(r.dtype).flatten(0, -2) for tensor in (x, dy, weight[None]))  # t d, t d, 1 d
        r = r.flatten(0, -2)  # t 1
        product = dy * x
        mean = product @ w.T / x.shape[-1]  # t 1
        dx = (dy * w).mul_(r).addcmul_(x, mean * r**3, value=-1)
        return (
            dx.to(weight.dtype).view(shape),
            (r.T @ product)[0].to(weight.dtype),
            None,
        )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
    return (wide * r).mul_(weight).to(x.dtype), r


class RMSNorm(nn.Module):
    """Scale `x` (.. d) to unit mean square, then by a learnt weight per dimension."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            if not torch.is_grad_enabled():  # decoding a few tokens is mostly calls: this saves one
                return _rms_norm(x, self.weight, self.eps)[0]
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return y
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the dense feed-forward layer and the shared experts."""

    def __init__(self, d: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d, inner)
        self.up_proj = Linear(d, inner)
        self.down_proj = Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
