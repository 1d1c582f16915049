"""Routed experts on a CPU for the few tokens of a decoding step: every expert computes every token.

The gate value is 0 where an expert was not chosen. Sorted by expert, few tokens leave each a GEMM of a few
rows, whose call costs more than its arithmetic.

Axes    t tokens, d width, i inner width, e experts, k experts a token
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ALL_AT_ONCE = {torch.float32: 3 << 20, torch.bfloat16: 24 << 20}
"""Products with unchosen experts up to which it costs less to compute them than to leave them out: a third of
a millisecond."""


def all_at_once(u: Tensor, ids: Tensor, g: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    """sum_i g_i expert_i(u) for tokens `u` (t d), chosen experts `ids` (t k) and gate values `g` (t k), with
    weights `gate_up` (e 2i d) and `down` (e d i); without gradients.

    None for more tokens than this is good for, with gradients, and on a GPU."""
    e, d, i = down.shape
    unchosen = len(u) * (e - ids.shape[1]) * d * i
    if u.device.type != "cpu" or torch.is_grad_enabled() or unchosen > ALL_AT_ONCE.get(u.dtype, 0):
        return None
    gate, up = torch.bmm(u.expand(e, -1, -1), gate_up.transpose(1, 2)).chunk(2, dim=-1)  # e t i
    gates = torch.zeros(len(u), e, dtype=u.dtype).scatter_(1, ids, g.to(u.dtype))
    a = F.silu(gate).mul_(up).mul_(gates.T[..., None])
    return torch.bmm(a, down.transpose(1, 2)).sum(0)  # e t d -> t d
