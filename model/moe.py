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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.cpu.experts import ByExpert, all_at_once
from model.kernels.layout import Layout
from model.layers import MLP

BF16_PAD_FROM = 512
"""Tokens of a batch from which bf16 rows of experts are padded; smaller ones would be mostly padding."""
BY_EXPERT_FROM = 32
"""Token-expert pairs an expert, on average, from which a CPU computes experts one at a time."""


class Gate(nn.Module):
    """Choose k of e experts per token.

    Affinities are fp32: in bf16 near-ties flip, and an expert that differs between rollout and training
    makes the token off-policy. The bias stays fp32 too, or a step of 0.001 would round away."""

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
        record is -1 are routed afresh."""
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
        flat = ids.flatten()  # not by bincount: it makes the host wait for a GPU
        self.load.scatter_add_(0, flat, torch.ones_like(flat))

    @torch.no_grad()
    def differing(self, s: Tensor, recorded: Tensor) -> Tensor:
        """Of the experts that the gate itself picks by `s` (t e): how many are not among the `recorded` ones
        (t k), and how many were compared (2). Tokens without a record, -1, are not."""
        known = recorded[:, :1] >= 0  # t 1
        other = (self.select(s)[:, :, None] != recorded[:, None]).all(-1)  # t k
        return torch.stack([(other & known).sum(), known.sum() * self.k])

    @torch.no_grad()
    def update_bias(self, gamma: float) -> None:
        """Move each bias by gamma against its expert's surplus of tokens; set the counts to 0.

        The surplus is that of all ranks together, or replicas would drift apart."""
        if gamma:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(self.load)
            load = self.load.float()
            self.e_score_correction_bias += gamma * torch.sign(load.mean() - load)
        self.load.zero_()


def load_metrics(load: Tensor) -> dict[str, float]:
    """Max violation (arXiv:2408.15664, Eq. 4) of each layer and of the worst; `load` (layers, experts)."""
    trained = load.sum(-1) > 0  # RL leaves the MTP modules out
    if not trained.any():
        return {"router/max_violation": 0.0}
    layers = trained.nonzero().squeeze(1).tolist()
    violation = (load[layers].amax(-1) / load[layers].mean(-1) - 1).tolist()
    by_layer = {f"router/max_violation/{n}": value for n, value in zip(layers, violation, strict=True)}
    idle = float((load[layers] == 0).float().mean())
    return {"router/max_violation": max(violation), **by_layer, "router/idle": idle}


def balance_loss(s: Tensor, ids: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Sequence-wise balance loss (Eq. 17-20 without alpha), mean over the sequences.

        f_i = e / (k T) * tokens sent to i     P_i = 1 / T * sum_t s_i / sum_j s_j     loss = sum_i f_i P_i

    Of `ids` (t k) only k is used: Eq. 18 counts the top-k of the affinities `s` (t e) themselves, without the
    bias. `sequence` (t) numbers the `sequences` that the tokens are in."""
    e, k = s.shape[1], ids.shape[1]
    chosen = torch.zeros_like(s).scatter_(1, s.detach().topk(k, dim=1).indices, 1.0)  # t e
    share = s / s.sum(1, keepdim=True)
    zeros = s.new_zeros(sequences, e)
    tokens = s.new_zeros(sequences).index_add_(0, sequence, torch.ones_like(sequence, dtype=s.dtype))[:, None]
    f = zeros.index_add(0, sequence, chosen) * (e / k) / tokens
    p = zeros.index_add(0, sequence, share) / tokens
    return (f * p).sum() / sequences


class Dispatch(torch.autograd.Function):
    """Tokens `u` (t d) in the order `token` (m), where t stands for a row of zeros.

    The gradient of a token is the sum over its rows `slots` (t k), the inverse of `token`. Reading them is
    several times faster than adding rows up one by one, and the order of additions is fixed."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, token: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return F.pad(u, (0, 0, 0, 1)).index_select(0, token)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _sum_rows(dy, ctx.saved_tensors[0]), None, None


class Combine(torch.autograd.Function):
    """The reverse of `Dispatch`: each token's k rows of `y` (m d), summed: (t d)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_rows(y, slots)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return F.pad(dout, (0, 0, 0, 1)).index_select(0, ctx.saved_tensors[0]), None, None


def _sum_rows(x: Tensor, slots: Tensor) -> Tensor:
    """Rows of `x` (m d) at `slots` (t k), summed over k: (t d)."""
    return x.index_select(0, slots.flatten()).unflatten(0, slots.shape).sum(1)


class WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * g for `h` = [gate ; up] (m 2i) and gate values `g` (m 1): (m i)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        ctx.save_for_backward(h, g)
        return F.silu(gate).mul_(up).mul_(g)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor]:
        h, g = ctx.saved_tensors
        gate, up = h.chunk(2, dim=-1)
        silu = F.silu(gate)
        dh = torch.empty_like(h)
        d_gate, d_up = dh.chunk(2, dim=-1)
        torch.mul(da, silu, out=d_up)  # d(silu up), less the factors that differ
        dg = torch.linalg.vecdot(d_up, up).unsqueeze(-1)
        d_up.mul_(g)
        d_gate.copy_(torch.ops.aten.silu_backward((da * up).mul_(g), gate))
        return dh, dg


class Plan(NamedTuple):
    """Rows of token-expert pairs: sorted by expert, an expert's rows padded to a multiple of `align`."""

    rows: Tensor  # e, rows of each expert, padding included
    token: Tensor  # m, the token of each row; t = padding
    pair: Tensor  # m, which of the t k pairs a row is; t k = none
    slots: Tensor  # t k, the row of each pair

    @classmethod
    def of(cls, ids: Tensor, experts: int, align: int) -> "Plan":
        """For the choice `ids` (t k) among `experts`. With `align` 1 the host waits for nothing."""
        t, k = ids.shape
        flat = ids.flatten()
        loads = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
        rows = (loads + align - 1) // align * align
        order = flat.argsort(stable=True)  # pairs by expert
        padding = (rows - loads).cumsum(0) - (rows - loads)  # padding rows before each expert's
        at = torch.arange(t * k, device=ids.device) + padding[flat[order]]
        m = t * k if align == 1 else int(rows.sum())
        pair = torch.full((m,), t * k, device=ids.device).index_copy_(0, at, order)
        slots = torch.empty_like(order).index_copy_(0, order, at)
        return cls(rows, pair.div(k, rounding_mode="floor"), pair, slots.view(t, k))

    def gates(self, g: Tensor, dtype: torch.dtype) -> Tensor:
        """The gate value of each row (m 1), from those of the pairs `g` (t k); 0 for padding."""
        return F.pad(g.flatten(), (0, 1))[self.pair, None].to(dtype)


class Experts(nn.Module):
    """The routed experts, stacked: `gate_up_proj` (e 2i d) and `down_proj` (e d i).

    In memory outputs lie side by side, not inputs: a GEMM of few rows then reads its weight as it lies,
    which makes decoding on a CPU 10 % faster, and a training step 2 to 3 % slower (docs/LOG.md)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, d, 2 * i).transpose(1, 2))
        self.down_proj = nn.Parameter(torch.empty(e, i, d).transpose(1, 2))

    def forward(self, u: Tensor, ids: Tensor, g: Tensor) -> Tensor:
        """sum_i g_i expert_i(u) for tokens `u` (t d), chosen experts `ids` (t k), gate values `g` (t k)."""
        if (quick := all_at_once(u, ids, g, self.gate_up_proj, self.down_proj)) is not None:
            return quick
        plan = Plan.of(ids, len(self.down_proj), alignment(u))
        if one_at_a_time(u, len(plan.token), len(self.down_proj)):
            gates, counts = plan.gates(g, u.dtype), plan.rows.tolist()
            y: Tensor = ByExpert.apply(u, gates, self.gate_up_proj, self.down_proj, counts, plan.token)
            return y
        return self.side_by_side(u, g, plan)

    def side_by_side(self, u: Tensor, g: Tensor, plan: Plan) -> Tensor:
        """`forward` in two products of all experts."""
        h = self.grouped(Dispatch.apply(u, plan.token, plan.slots), self.gate_up_proj, plan.rows)  # m 2i
        # The gate value goes in here and not after down_proj, where rows are d wide.
        a = WeightedSwiGLU.apply(h, plan.gates(g, u.dtype))
        return Combine.apply(self.grouped(a, self.down_proj, plan.rows), plan.token, plan.slots)

    def grouped(self, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """Rows `x` (m i), `rows` (e) of them an expert, each times its expert's weight (e o i)^T: (m o).

        torch's product takes types of up to 4 bytes, and rows that are multiples of 16."""
        size = x.element_size()
        if size <= 4 and all(n * size % 16 == 0 for n in weight.shape[1:]):
            return F.grouped_mm(x, weight.transpose(1, 2), offs=rows.cumsum(0).to(torch.int32))
        return torch.cat([part @ w.T for part, w in zip(x.split(rows.tolist()), weight, strict=True)])


def alignment(u: Tensor) -> int:
    """The multiple to which the rows of an expert are padded, for tokens `u` (t d).

    On a CPU torch compiles a bf16 kernel for every new size, which takes several times as long as to run it:
    multiples of 64 leave few sizes. fp32 kernels exist for all."""
    few_sizes = u.device.type == "cpu" and u.dtype == torch.bfloat16
    return 64 if few_sizes and len(u) >= BF16_PAD_FROM else 1


def one_at_a_time(u: Tensor, pairs: int, experts: int) -> bool:
    """Whether experts run one after the other: on a CPU, if each has enough pairs to pay for its calls."""
    return u.device.type == "cpu" and pairs >= BY_EXPERT_FROM * experts


class MoE(nn.Module):
    """Shared experts plus the routed experts that the gate picks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.balance_loss: Tensor | None = None  # since the last `Transformer.pop_balance_loss`
        self.differing: Tensor | None = None  # `Gate.differing`, since the last `Transformer.after_update`
        self.recomputing = False  # this forward repeats one for the backward, which was counted

    def forward(
        self, x: Tensor, layout: Layout | None = None, recorded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Feed-forward of `x` (.. d): the same shape, and the experts of every token (t k).

        Choices that an engine `recorded` (.. k) are repeated, unless `layout.replay` is off. Without a
        `layout` nothing is counted."""
        u = x.flatten(0, -2)  # t d
        known = None if recorded is None else recorded.flatten(0, -2).long()  # t k
        ids, g, s = self.gate(u, known if layout is None or layout.replay else None)
        if layout is not None and layout.counted and not self.recomputing:
            self.gate.count(ids)
            if known is not None:
                found = self.gate.differing(s, known)
                self.differing = found if self.differing is None else self.differing + found
        if layout is not None and layout.balance:
            loss = balance_loss(s, ids, layout.packed.index, len(layout.packed.lengths))
            if not self.recomputing:
                self.balance_loss = loss if self.balance_loss is None else self.balance_loss + loss
        return (self.experts(u, ids, g) + self.shared_experts(u)).view_as(x), ids
