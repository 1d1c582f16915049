"""FP8 training: linear layers and experts whose three products run in FP8.

DeepSeek-V3, arXiv:2412.19437, Sec. 3.3. Fprop, Dgrad and Wgrad of the attention's and feed-forwards' linear
layers are in FP8; embedding, output head, gate, norms and attention itself are not (Sec. 3.3.1), nor is
`eh_proj`, which the released FP8 weights keep in bf16. The optimizer's masters are fp32.

    y  = Q(x) Q(W)^T       Q(x) kept for the backward, 1 byte a number   (Fprop)
    dx = Q(dy) Q(W)        the same Q(W): blocks are square               (Dgrad)
    dW = Q'(dy)^T Q'(Q(x)) Q' in tiles along the tokens                   (Wgrad)

Parameters keep their names and types, so checkpoints, optimizers and the absorbed decode work unchanged.

Axes    t tokens, i input and o output channels, e experts, m token-expert pairs, k experts a token
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from model.kernels.cpu.linear import Linear
from model.kernels.fp8 import gemm
from model.kernels.fp8.blocks import BLOCK, Quantized, transpose
from model.moe import Experts, Plan

KEPT = {"lm_head", "eh_proj"}  # linear layers that stay as they are, by the last part of their names
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of the released config.json."""


class _Product(torch.autograd.Function):
    """`x` (t i), `weight` (o i) and the same weight in FP8: y (t o). With `counts`, the rows of each expert:
    `x` (m i) sorted by expert, `weight` (e o i): y (m o)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, w: Quantized, counts: list[int] | None) -> Tensor:
        a = gemm.quantize(x, 1, power_of_two=True)
        ctx.save_for_backward(*a[:2], *w[:2])
        ctx.counts, ctx.dtype = counts, weight.dtype
        return _multiply(a, w, counts, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            turned = transpose(Quantized(w, w_scale, BLOCK))
            dx = _multiply(gemm.quantize(dy, 1), turned, ctx.counts, dy.dtype)
        if ctx.needs_input_grad[1]:
            a = Quantized(x, x_scale, 1)
            if ctx.counts is None:
                dw = gemm.weight_gradient(dy, a, ctx.dtype)
            else:
                dw = gemm.weight_gradient_grouped(dy, a, ctx.counts, ctx.dtype)
        return dx, dw, None, None


def _multiply(a: Quantized, w: Quantized, counts: list[int] | None, dtype: torch.dtype) -> Tensor:
    return gemm.multiply(a, w, dtype) if counts is None else gemm.multiply_grouped(a, w, counts, dtype)


class _Steps:
    """Optimizer steps of this process. Fused optimizers change weights without raising their version."""

    taken = 0

    @classmethod
    def count(cls, *_: object) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


class _Kept:
    """A weight's FP8 form, made again when the weight has changed: once an update, not once a micro-batch."""

    def __init__(self) -> None:
        self.made_for: tuple[int, ...] = ()

    @torch.no_grad()
    def of(self, weight: Tensor) -> Quantized:
        """`weight` (.. o i) in blocks. Renewed after `copy_` and optimizers, not after writes to `.data`."""
        now = (weight.data_ptr(), weight._version, _Steps.taken)
        if self.made_for != now:
            self.quantized, self.made_for = gemm.quantize(weight.detach(), BLOCK), now
        return self.quantized

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Kept":
        return _Kept()  # it belongs to the weight's memory


class Fp8Linear(nn.Linear):
    """A linear layer whose products are in FP8; weight and bias are shared with it."""

    def __init__(self, of: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        self.kept = _Kept()

    def forward(self, x: Tensor) -> Tensor:
        """`x` (.. i) to (.. o), in the dtype of `x`."""
        y = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.kept.of(self.weight), None)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Fp8Experts(Experts):
    """The routed experts with grouped products in FP8."""

    def __init__(self, of: Experts) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = of.gate_up_proj, of.down_proj
        self.kept_up, self.kept_down = _Kept(), _Kept()

    def forward(self, u: Tensor, ids: Tensor, g: Tensor) -> Tensor:
        """As `Experts.forward`, by grouped products alone; they take any number of rows."""
        return self.side_by_side(u, g, Plan.of(ids, len(self.down_proj), 1))

    def grouped(self, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """As `Experts.grouped`, in FP8."""
        kept = self.kept_up if weight is self.gate_up_proj else self.kept_down
        y: Tensor = _Product.apply(x, weight, kept.of(weight), rows.tolist())
        return y


def to_fp8(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint `tensors` by public name, those of linear layers and experts as FP8 blocks with scales."""
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        layer = stem.rpartition(".")[2]
        if leaf == "weight" and layer not in KEPT and layer.endswith(("_proj", "_proj_with_mqa")):
            values, scale, _ = gemm.quantize(tensor, BLOCK)
            yield name, values
            yield f"{name}_scale_inv", scale
        else:
            yield name, tensor


def supported(device: torch.device) -> bool:
    """Whether `device` can do this: a CPU emulates it, a GPU needs compute capability 8.9."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def convert(net: nn.Module) -> int:
    """Swap the linear layers and experts of `net` for FP8 ones, in place; return their number.

    Every linear layer but those named in `KEPT`: of a `Transformer`, and of a transformers network alike.
    Parameters are shared, not copied. Converting twice changes nothing."""
    swapped = 0
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            known = type(child) in (nn.Linear, Linear)
            if known and isinstance(child, nn.Linear) and name not in KEPT:
                setattr(parent, name, Fp8Linear(child))
            elif type(child) is Experts:
                setattr(parent, name, Fp8Experts(child))
            else:
                continue
            swapped += 1
    return swapped
