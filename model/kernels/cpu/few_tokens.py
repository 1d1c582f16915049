"""Routed experts for the few tokens of a decoding step, on a CPU and without gradients.

Sorted by expert, as in training, a step's tokens leave each expert a GEMM of a few rows, whose call costs
more than its arithmetic. Instead:

    all_at_once     every expert computes every token, with a gate value of 0 where it was not chosen:
                    no sorting. For fewer tokens than experts or so.
    side_by_side    each expert computes as many rows as the busiest one has, in one batched GEMM for all.

Axes    t tokens, d width, i inner width, e experts, k experts per token, c rows of the busiest expert
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ALL_AT_ONCE = {torch.float32: 3 << 20, torch.bfloat16: 24 << 20}
"""Products with unchosen experts up to which it costs less to compute them than to leave them out: a third of
a millisecond."""
SIDE_BY_SIDE = 32
"""Rows of the busiest expert up to which the batched GEMM is ahead of one GEMM an expert."""


def experts_of(u: Tensor, ids: Tensor, g: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    """sum_i g_i expert_i(u) for tokens `u` (t d); None where training's way is as good, or needed.

    For chosen experts `ids` (t k) and gate values `g` (t k), with weights `gate_up` (e 2i d), `down` (e d i).
    """
    if u.device.type != "cpu" or torch.is_grad_enabled():
        return None
    e, d, i = down.shape
    if len(u) * (e - ids.shape[1]) * d * i <= ALL_AT_ONCE.get(u.dtype, 0):
        return all_at_once(u, ids, g, gate_up, down)
    if ids.numel() <= SIDE_BY_SIDE * e and int(loads_of(ids, e).max()) <= SIDE_BY_SIDE:
        return side_by_side(u, ids, g, gate_up, down)
    return None


def all_at_once(u: Tensor, ids: Tensor, g: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `experts_of`."""
    h = torch.bmm(u.expand(len(down), -1, -1), gate_up.transpose(1, 2))  # e t 2i
    gates = torch.zeros(len(u), len(down), dtype=u.dtype).scatter_(1, ids, g.to(u.dtype))
    a = _swiglu(h).mul_(gates.T[..., None])  # e t i
    return torch.bmm(a, down.transpose(1, 2)).sum(0)  # e t d -> t d


def side_by_side(u: Tensor, ids: Tensor, g: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `experts_of`."""
    (t, k), e, flat = ids.shape, len(down), ids.flatten()
    loads = loads_of(ids, e)
    c = int(loads.max())
    order = flat.argsort(stable=True)  # pairs by expert
    rank = torch.arange(t * k) - (loads.cumsum(0) - loads)[flat[order]]  # of a pair among its expert's
    at = flat[order] * c + rank
    token = torch.full((e * c,), t).index_copy_(0, at, order.div(k, rounding_mode="floor"))
    gates = u.new_zeros(e * c).index_copy_(0, at, g.flatten()[order].to(u.dtype))
    slots = torch.empty_like(order).index_copy_(0, order, at)
    x = F.pad(u, (0, 0, 0, 1)).index_select(0, token).view(e, c, -1)  # padding rows are zeros
    h = torch.bmm(x, gate_up.transpose(1, 2))  # e c 2i
    y = torch.bmm(_swiglu(h).mul_(gates.view(e, c, 1)), down.transpose(1, 2))  # e c d
    return y.flatten(0, 1).index_select(0, slots).view(t, k, -1).sum(1)


def loads_of(ids: Tensor, experts: int) -> Tensor:
    """Pairs of each expert (e)."""
    return torch.bincount(ids.flatten(), minlength=experts)


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
