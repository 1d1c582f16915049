"""Linear layers for training on a CPU in fp32.

torch multiplies fp32 matrices with MKL, which is made for another maker's processors; oneDNN, which torch
carries as well and uses for bf16, is 15 % faster where AVX-512 runs at full rate (docs/LOG.md). It compiles a
kernel for each shape it meets, so it only gets the shapes that come back at every step: those of training.
`mkldnn._linear_pointwise` is the operator that torch's own compiler calls for a linear layer.

Axes    t tokens, i inputs, o outputs
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 256  # from which the fixed cost of a call is lost in the product
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def suits(x: Tensor) -> bool:
    """Whether oneDNN can multiply `x` (.. i), and is faster."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return AVAILABLE and fp32_on_cpu and x.numel() >= ROWS * x.shape[-1]


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """`x` (.. i) times `weight` (o i) transposed, without autograd."""
    if not suits(x):
        return F.linear(x, weight)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    """x W^T. MKL keeps the weight's gradient: oneDNN would have to transpose both its factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return times_transposed(dy, weight.T), dy.flatten(0, -2).T @ x.flatten(0, -2)


class Linear(nn.Linear):
    """`nn.Linear` without bias; the same numbers but for rounding."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (.. i) to (.. o)."""
        if torch.is_grad_enabled() and self.weight.requires_grad and suits(x):
            y: Tensor = _Linear.apply(x, self.weight)
            return y
        return F.linear(x, self.weight)
