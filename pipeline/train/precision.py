"""What the network computes in, and what the optimizer keeps for it.

`float32` trains the network's `Own` parameters. Otherwise those are bf16, the optimizer steps fp32 `Masters`
of them, and gradients add up in fp32 (DeepSeek-V3, arXiv:2412.19437, Sec. 3.3.1 and 3.3.3); `fp8` also runs
the linear layers' products in FP8 (`model.scale.fp8`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.scale import fp8
from pipeline.errors import UserError
from pipeline.settings.common import OptimSettings


class Own:
    """A network's trained parameters themselves, as the optimizer is to see them.

    That is with their axes in the order of memory: AdamW's fused step copies every tensor that is not
    contiguous, there and back, and the experts' are not (`model.moe.Experts`)."""

    def __init__(self, net: nn.Module) -> None:
        self.working = [p for p in net.parameters() if p.requires_grad]
        self.orders = [memory_order(p) for p in self.working]
        self.stepped = [self.in_memory_order(*both) for both in zip(self.working, self.orders, strict=True)]
        self.parts = list(zip(self.working, self.stepped, self.orders, strict=True))

    def in_memory_order(self, p: nn.Parameter, order: list[int]) -> nn.Parameter:
        """What the optimizer steps of parameter `p`."""
        return p if p.is_contiguous() else nn.Parameter(p.detach().permute(order))

    def collect(self) -> None:
        """Show the optimizer the gradients."""
        for p, stepped, order in self.parts:
            stepped.grad = None if p.grad is None else p.grad.permute(order)

    def publish(self) -> None:
        """No-op: the optimizer updates the network's own tensors."""

    def clear(self) -> None:
        """Drop the gradients."""
        for p, stepped, _ in self.parts:
            p.grad = stepped.grad = None

    def state_dict(self) -> dict[str, list[Tensor]]:
        """What the network's own state lacks: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take over `state_dict`'s values; the network restores its own."""


class Masters(Own):
    """fp32 masters of a network's trained parameters, which become bf16 in place.

    A backward moves its gradients here at once, so micro-batches add up in fp32."""

    def __init__(self, net: nn.Module, precision: str) -> None:
        device = next(net.parameters()).device
        if precision == "fp8" and not fp8.supported(device):
            raise UserError(f"{device} has no FP8 arithmetic; set optim.precision to bfloat16")
        super().__init__(net)
        for p in net.parameters():  # not buffers: rotary frequencies and gate biases stay in fp32
            p.data = p.data.to(torch.bfloat16)
        if precision == "fp8":
            fp8.convert(net)
        for p, master, order in self.parts:
            p.register_post_accumulate_grad_hook(partial(self._move, master, order))

    def in_memory_order(self, p: nn.Parameter, order: list[int]) -> nn.Parameter:
        """An fp32 copy."""
        return nn.Parameter(p.detach().permute(order).float().clone())

    @staticmethod
    def _move(master: Tensor, order: list[int], p: Tensor) -> None:
        assert p.grad is not None
        grad = p.grad.permute(order)
        master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
        p.grad = None

    def collect(self) -> None:
        """No-op: each backward has moved its gradients."""

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the network's parameters."""
        for p, master, order in self.parts:
            p.permute(order).copy_(master)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The masters' values, in the shapes of the network's parameters."""
        return {"masters": [master.detach().permute(inverse(order)) for _, master, order in self.parts]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take over `state_dict`'s values; the network restores its own."""
        for (_, master, order), value in zip(self.parts, state["masters"], strict=True):
            master.copy_(value.permute(order))


def memory_order(p: Tensor) -> list[int]:
    """The axes of `p`, those that are furthest apart in memory first; as they are if it is contiguous."""
    if p.is_contiguous():  # the stride of an axis of size 1 can be anything
        return list(range(p.ndim))
    return sorted(range(p.ndim), key=p.stride().__getitem__, reverse=True)


def inverse(order: list[int]) -> list[int]:
    """The axes that undo `permute(order)`."""
    return sorted(range(len(order)), key=order.__getitem__)


def optimizer_state(adamw: torch.optim.Optimizer, weights: Own) -> dict[str, Any]:
    """`adamw.state_dict()`, its moments in the shapes of the network's parameters."""
    return _with_axes(adamw, weights, adamw.state_dict(), inverse)


def load_optimizer_state(adamw: torch.optim.Optimizer, weights: Own, state: dict[str, Any]) -> None:
    """Take over what `optimizer_state` returned."""
    adamw.load_state_dict(_with_axes(adamw, weights, state, list))


def _with_axes(
    adamw: torch.optim.Optimizer, weights: Own, state: dict[str, Any], axes: Callable[[list[int]], list[int]]
) -> dict[str, Any]:
    """`state` with moments permuted by the `axes` of their parameter's memory order."""
    order = {id(p): axes(order) for _, p, order in weights.parts}
    orders = [order[id(p)] for group in adamw.param_groups for p in group["params"]]  # as AdamW numbers them
    moments = {
        i: {key: x.permute(orders[i]).contiguous() if x.ndim else x for key, x in of.items()}
        for i, of in state["state"].items()
    }
    return {**state, "state": moments}


def optimizer(parameters: Sequence[nn.Parameter], optim: OptimSettings) -> torch.optim.Optimizer:
    """AdamW, with decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    if optim.moments == "bfloat16":
        return HalfMomentAdamW(groups, lr=optim.lr, betas=betas)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, fused=True)


class HalfMomentAdamW(torch.optim.Optimizer):
    """AdamW whose two moments are stored in bf16 and updated in fp32 (arXiv:2412.19437, Sec. 3.3.3).

    Decoupled weight decay, arXiv:1711.05101, Alg. 2. Rounding to bf16 loses changes of less than 0.4 %, so
    the second moment only forgets if beta2 is well below 0.996: `OptimSettings` refuses more than 0.99."""

    def __init__(self, groups: list[dict[str, object]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    first, second = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in range(2))
                    state |= {"step": torch.zeros(()), "exp_avg": first, "exp_avg_sq": second}
                state["step"] += 1
                count, grad = float(state["step"]), p.grad.float()
                m = state["exp_avg"].float().lerp_(grad, 1 - beta1)
                v = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                scale = v.div_(1 - beta2**count).sqrt_().add_(group["eps"])
                p.addcdiv_(m, scale, value=-group["lr"] / (1 - beta1**count))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, which would hold the moments in fp32 for a moment."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, of in state_dict["state"].items():
            device = parameters[i].device
            self.state[parameters[i]] = {key: x.to(device) if x.ndim else x for key, x in of.items()}
