"""The two small layers that everything else is made of: RMSNorm and the gated feed-forward.

Papers  RMSNorm  arXiv:1910.07467  Eq. 4
        SwiGLU   arXiv:2002.05202  Eq. 6
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu.linear import Linear

PART = 1 << 18  # numbers that stay in the cache between the passes over them


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
        shape, (x, dy, r) = x.shape, (tensor.flatten(0, -2) for tensor in (x, dy, r))  # t d, t d, t 1
        w, dx = weight.to(r.dtype), torch.empty_like(x)
        dw = torch.zeros_like(w)
        # A part at a time, or each of these lines would read and write main memory.
        rows = max(1, PART // w.shape[0])
        for x_, dy_, r_, dx_ in zip(*(tensor.split(rows) for tensor in (x, dy, r, dx)), strict=True):
            x_, dy_ = x_.to(r.dtype), dy_.to(r.dtype)
            product = dy_ * x_
            mean = (product @ w)[:, None] / w.shape[0]  # t 1
            dw += (r_.T @ product)[0]
            dx_.copy_(torch.mul(dy_, w, out=product).mul_(r_).addcmul_(x_, mean * r_**3, value=-1))
        return dx.view(shape), dw.to(weight.dtype), None


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
