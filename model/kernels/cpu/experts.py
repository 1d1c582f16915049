"""Routed experts on a CPU: one after the other in training, all at once for a few tokens without gradients.

One after the other, with the backward written out:

    h = [gate ; up] = x W_h^T         a = g silu(gate) up           y = a W_d^T

    da = dy W_d       dup = g da silu(gate)     dgate = g da up silu'(gate)     dg = sum da silu(gate) up
    dx = dh W_h       dW_h = dh^T x             dW_d = dy^T a

Done for all experts at once, each step reads and writes main memory, which takes a quarter of the time. The
x, a and y of one expert and their gradients stay in the core's cache; of the forward h alone is kept.

All at once: every expert computes every token, with a gate value of 0 where it was not chosen. Sorted by
expert, few tokens leave each a GEMM of a few rows, whose call costs more than its arithmetic.

Axes    t tokens, d width, i inner width, e experts, k experts a token, m token-expert pairs sorted by expert
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALL_AT_ONCE = {torch.float32: 3 << 20, torch.bfloat16: 24 << 20}
"""Products with unchosen experts up to which it costs less to compute them than to leave them out: a third of
a millisecond."""


class ByExpert(torch.autograd.Function):
    """sum_i g_i expert_i(u) for tokens `u` (t d), gate values `g` (m 1), weights `gate_up` (e 2i d), `down`
    (e d i); `counts` are the pairs of each expert, `token` (m) the token of each pair, t = a padding row."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, g: Tensor, gate_up: Tensor, down: Tensor, counts: list[int], token: Tensor
    ) -> Tensor:
        padded = _with_padding(u, token)
        # Sums over experts: in bf16 they would lose what a small term adds.
        out = torch.zeros_like(padded, dtype=torch.promote_types(u.dtype, torch.float32))
        h = u.new_empty(len(token), gate_up.shape[1])
        parts = zip(*(x.split(counts) for x in (token, h, g)), strict=True)
        for e, (tokens, h_e, g_e) in enumerate(parts):
            torch.mm(padded.index_select(0, tokens), gate_up[e].T, out=h_e)
            gate, up = h_e.chunk(2, dim=-1)
            y = F.silu(gate).mul_(up).mul_(g_e) @ down[e].T
            out.index_add_(0, tokens, y.to(out.dtype))
        ctx.save_for_backward(padded, g, gate_up, down, token, h)
        ctx.counts = counts
        return out[: len(u)].to(u.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        padded, g, gate_up, down, token, h = ctx.saved_tensors
        t, dout = len(dout), _with_padding(dout, token)
        du = torch.zeros_like(padded, dtype=torch.promote_types(padded.dtype, torch.float32))
        dg, d_gate_up, d_down = (torch.empty_like(x) for x in (g, gate_up, down))
        parts = zip(*(x.split(ctx.counts) for x in (token, h, g, dg)), strict=True)
        for e, (tokens, h_e, g_e, dg_e) in enumerate(parts):
            dy = dout.index_select(0, tokens)
            a, dh = _swiglu_backward(dy @ down[e], h_e, g_e, dg_e)
            torch.mm(dy.T, a, out=d_down[e])
            torch.mm(dh.T, padded.index_select(0, tokens), out=d_gate_up[e])
            du.index_add_(0, tokens, (dh @ gate_up[e]).to(du.dtype))
        return du[:t].to(padded.dtype), dg, d_gate_up, d_down, None, None


def _with_padding(u: Tensor, token: Tensor) -> Tensor:
    """`u` (t d), with a row of zeros if `token` has padding rows."""
    return F.pad(u, (0, 0, 0, 1)) if token.max() == len(u) else u


def _swiglu_backward(da: Tensor, h: Tensor, g: Tensor, dg: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `dh` of one expert; fills `dg` and uses up `da`."""
    gate, up = h.chunk(2, dim=-1)
    silu = F.silu(gate)
    a, dh = silu * up, torch.empty_like(h)
    d_gate, d_up = dh.chunk(2, dim=-1)
    torch.linalg.vecdot(da, a, out=dg.squeeze(1))
    da.mul_(g)
    torch.mul(da, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=d_gate)
    return a.mul_(g), dh


def all_at_once(u: Tensor, ids: Tensor, g: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    """As `ByExpert`, for chosen experts `ids` (t k) and gate values `g` (t k); without gradients.

    None for more tokens than this is good for, with gradients, and on a GPU."""
    e, d, i = down.shape
    unchosen = len(u) * (e - ids.shape[1]) * d * i
    if u.device.type != "cpu" or torch.is_grad_enabled() or unchosen > ALL_AT_ONCE.get(u.dtype, 0):
        return None
    gate, up = torch.bmm(u.expand(e, -1, -1), gate_up.transpose(1, 2)).chunk(2, dim=-1)  # e t i
    gates = torch.zeros(len(u), e, dtype=u.dtype).scatter_(1, ids, g.to(u.dtype))
    a = F.silu(gate).mul_(up).mul_(gates.T[..., None])
    return torch.bmm(a, down.transpose(1, 2)).sum(0)  # e t d -> t d
