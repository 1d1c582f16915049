"""DeepSeekMoE: shared experts, routed experts, and a gate kept even by a bias instead of a loss.

DeepSeek-V3, arXiv:2412.19437, Sec. 2.1.2, in the names of the released weights. For a token u:

    s  = sigmoid(W u)                       affinity of every expert                             (Eq. 15)
    S  = top-k of s + b                     within the best groups; the bias only selects        (Eq. 16)
    g  = scale * s_S / (sum s_S + 1e-20)    gate values                                          (Eq. 13)
    y  = shared(u) + sum_(i in S) g_i expert_i(u)                                                (Eq. 12)
    b += gamma * sign(mean load - load)     after each optimizer step (Sec. 2.1.2, arXiv:2408.15664 Alg. 1)

Axes    t tokens, d width, e experts, k experts per token, m = t k token-expert pairs, i expert inner width
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import MLP
from .layout import Layout


class Gate(nn.Module):
    """Choose k of e experts per token.

    Affinities are fp32: in bf16 near-ties flip, and an expert that differs between rollout and training
    makes the token off-policy. The bias stays fp32 too, or a step of 0.001 would round away.
    """

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.n_routed_experts
        self.k, self.groups, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalize, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(e, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(e, dtype=torch.float))
        self.register_buffer("load", torch.zeros(e, dtype=torch.long), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """Follow `.to(..)` to another device, but not to another dtype."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, u: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens `u` (t d): expert ids (t k), gate values (t k), affinities (t e).

        `replay` (t k) repeats a recorded choice, with gate values from today's affinities; tokens whose
        record is -1 are routed afresh.
        """
        s = torch.sigmoid(F.linear(u.float(), self.weight.float()))  # t d, e d -> t e
        ids = self.select(s) if replay is None else torch.where(replay < 0, self.select(s), replay)
        g = s.gather(1, ids)  # t e, t k -> t k
        if self.normalize:
            g = g / (g.sum(1, keepdim=True) + 1e-20)
        return ids, g * self.scale, s

    @torch.no_grad()
    def select(self, s: Tensor) -> Tensor:
        """The k best experts by `s + b` (t e) among the best groups: ids (t k)."""
        choice = s + self.e_score_correction_bias
        if self.groups > 1:
            grouped = choice.unflatten(1, (self.groups, -1))  # t e -> t groups e/groups
            score = grouped.topk(2, dim=-1).values.sum(-1)  # t groups
            best = score.topk(self.topk_group, dim=-1, sorted=False).indices
            out = torch.ones_like(score, dtype=torch.bool).scatter_(1, best, False)
            # -inf as in the released code: a 0 would beat the negative scores of the chosen groups.
            choice = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
        return choice.topk(self.k, dim=-1, sorted=False).indices

    @torch.no_grad()
    def count(self, ids: Tensor) -> None:
        """Add the tokens that each expert received, `ids` (any shape), to `load` (e)."""
        self.load += torch.bincount(ids.flatten(), minlength=len(self.load))

    @torch.no_grad()
    def update_bias(self, gamma: float) -> None:
        """Move each bias by gamma against its expert's surplus of tokens; start counting anew."""
        if gamma:
            load = self.load.float()
            self.e_score_correction_bias += gamma * torch.sign(load.mean() - load)
        self.load.zero_()


def balance_loss(s: Tensor, ids: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Sequence-wise balance loss (Eq. 17-20 without alpha), mean over the sequences.

        f_i = e / (k T) * tokens sent to i     P_i = 1 / T * sum_t s_i / sum_j s_j     loss = sum_i f_i P_i

    Eq. 18 counts the top-k of s itself, without the bias.

    Args:
        s: `t e`, affinities; carries gradient.
        ids: `t k`, the choice whose k is used; the choice itself is made anew without the bias.
        sequence: `t`, number of the sequence that a token is in, -1 = none (padding).
        sequences: how many there are.
    """
    e, k = s.shape[1], ids.shape[1]
    inside = sequence >= 0
    s, sequence = s[inside], sequence[inside]
    chosen = torch.zeros_like(s).scatter_(1, s.detach().topk(k, dim=1).indices, 1.0)  # t e
    share = s / s.sum(1, keepdim=True)
    zeros = s.new_zeros(sequences, e)
    tokens = s.new_zeros(sequences).index_add_(0, sequence, torch.ones_like(sequence, dtype=s.dtype))[:, None]
    f = zeros.index_add(0, sequence, chosen) * (e / k) / tokens
    p = zeros.index_add(0, sequence, share) / tokens
    return (f * p).sum() / sequences


class GroupedLinear(torch.autograd.Function):
    """Rows `x` (m i), sorted by expert, each times its expert's weight (e o i)^T: (m o).

    One GEMM an expert, written into its place of one output; autograd over a loop would instead build each
    expert's gradient as a whole (e o i) tensor of zeros and add them up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(x.shape[0], weight.shape[1])
        for out, rows, w in zip(y.split(counts), x.split(counts), weight, strict=True):
            torch.mm(rows, w.T, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        dy_rows, x_rows = dy.split(ctx.counts), x.split(ctx.counts)
        for e, out in enumerate(dx.split(ctx.counts)):
            torch.mm(dy_rows[e], weight[e], out=out)
            torch.mm(dy_rows[e].T, x_rows[e], out=dw[e])
        return dx, dw, None


class Experts(nn.Module):
    """The routed experts, stacked: `gate_up_proj` (e 2i d) and `down_proj` (e d i)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))

    def forward(self, u: Tensor, ids: Tensor, g: Tensor) -> Tensor:
        """sum_i g_i expert_i(u) for tokens `u` (t d), chosen experts `ids` (t k), gate values `g` (t k)."""
        flat = ids.flatten()  # m, pair p belongs to token p // k
        counts = torch.bincount(flat, minlength=len(self.down_proj)).tolist()
        order = flat.argsort(stable=True)  # m, pairs by expert
        token = order.div(ids.shape[1], rounding_mode="floor")
        gate, up = GroupedLinear.apply(u[token], self.gate_up_proj, counts).chunk(2, dim=-1)  # m i
        y = GroupedLinear.apply(F.silu(gate) * up, self.down_proj, counts)  # m d
        y = y * g.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(u).index_add_(0, token, y)  # m d -> t d


class MoE(nn.Module):
    """Shared experts plus the routed experts that the gate picks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.balance_loss: Tensor | None = None  # since the last `Transformer.pop_balance_loss`

    def forward(
        self, x: Tensor, layout: Layout | None = None, replay: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Feed-forward of `x` (.. d): the same shape, and the experts of every token (t k).

        `replay` (.. k) repeats recorded choices. Without a `layout` nothing is counted.
        """
        u = x.flatten(0, -2)  # t d
        ids, g, s = self.gate(u, None if replay is None else replay.flatten(0, -2).long())
        if layout is not None and layout.counted:
            self.gate.count(ids if layout.sequence is None else ids[layout.sequence.flatten() >= 0])
        if layout is not None and layout.balance:
            loss = self._balance(s, ids, layout, x.shape[0])
            self.balance_loss = loss if self.balance_loss is None else self.balance_loss + loss
        return (self.experts(u, ids, g) + self.shared_experts(u)).view_as(x), ids

    @staticmethod
    def _balance(s: Tensor, ids: Tensor, layout: Layout, rows: int) -> Tensor:
        if layout.sequence is not None:
            return balance_loss(s, ids, layout.sequence.flatten(), layout.sequences)
        row = torch.arange(rows, device=s.device).repeat_interleave(len(s) // rows)
        return balance_loss(s, ids, row, rows)
