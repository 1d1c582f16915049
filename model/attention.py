"""Multi-head latent attention (MLA), in the two forms that compute the same thing.

DeepSeek-V3, arXiv:2412.19437, Sec. 2.1.1, in the names of the released weights. For the token x_t:

    c_t     = norm(W_DKV x_t)          latent                 kv_a_proj_with_mqa, kv_a_layernorm  (Eq. 1)
    k^R_t   = rope(W_KR x_t)           one key for all heads  kv_a_proj_with_mqa, last r rows     (Eq. 3)
    k_t,i   = [W_UK,i c_t ; k^R_t]     key of head i          kv_b_proj, first rows of a head     (Eq. 2, 4)
    v_t,i   = W_UV,i c_t               value of head i        kv_b_proj, last rows of a head      (Eq. 5)
    q_t,i   = [q^C_t,i ; rope(q^R_t,i)]                       q_a_proj, q_b_proj, or q_proj       (Eq. 6-9)
    o_t,i   = sum_j softmax_j(q_t,i . k_j,i / sqrt(n + r)) v_j,i                                  (Eq. 10)

The expanded form forms keys and values of all heads, as written: cheapest where many queries share them,
in training and prefill. The absorbed form moves W_UK to the query and W_UV to the output,

    q^C . (W_UK c_j) = (W_UK^T q^C) . c_j         sum_j p_j (W_UV c_j) = W_UV sum_j p_j c_j

so decoding reads the latents alone: all heads become queries of one head whose key and value are the cache.

Axes    b rows, s tokens, N = b s, d width, h heads, n unrotated and r rotated query dimensions (in a group of
        rows: its columns), v value dimensions, c kv_lora_rank, w = c + r, T tokens of the cache
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import PAGE, DecodeStep, Group
from model.config import ModelConfig
from model.kernels.attend import attend
from model.kernels.cpu.attention import CausalAttention
from model.kernels.cpu.linear import Linear
from model.kernels.layout import Layout
from model.kernels.packed import fold, unfold
from model.layers import RMSNorm
from model.rope import Rope, softmax_scale

# The released code builds the norms of the two latents with this whatever the config's rms_norm_eps.
LATENT_NORM_EPS = 1e-6
HEADS_AS_ROWS = 8
"""New tokens a row up to which heads count as further queries of one head: one product reads the cache for
all of them. With more, the mask that this needs is too large."""


class Attention(nn.Module):
    """MLA of one layer."""

    def __init__(self, config: ModelConfig, rope: Rope) -> None:
        super().__init__()
        d, h = config.hidden_size, config.num_attention_heads
        self.heads, self.scale, self.rope = h, softmax_scale(config), rope
        self.nope, self.rotary = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.rank = config.v_head_dim, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = Linear(d, h * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(d, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, h * config.qk_head_dim)
        self.low_rank_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(d, config.latent_dim)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.rank, h * (self.nope + self.value))
        self.o_proj = Linear(h * self.value, d)

    def _query(self, x: Tensor) -> Tensor:
        """Queries of `x` (.. d): (.. h n+r), the last r still to be rotated."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.low_rank_query else self.q_proj(x)
        return q.unflatten(-1, (self.heads, -1))

    def _latent(self, x: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """Latent (.. c) and shared rotated key (.. r) of `x` (.. d), at `rotations` (.. r/2)."""
        c, k = self.kv_a_proj_with_mqa(x).split([self.rank, self.rotary], dim=-1)
        return self.kv_a_layernorm(c), self.rope.rotate(k, rotations)

    def forward(self, x: Tensor, layout: Layout, cache: Tensor | None = None) -> Tensor:
        """Expanded form over `x` (b s d); latents go to this layer's `cache` (T w) at `layout.slots`."""
        rotations = layout.rotations
        q = self._query(x)  # b s h n+r
        c, k_rot = self._latent(x, rotations)  # b s c, b s r
        if cache is not None and layout.slots is not None:
            cache.index_copy_(0, layout.slots, torch.cat([c, k_rot], dim=-1).flatten(0, 1))
        kv = self.kv_b_proj(c).unflatten(-1, (self.heads, -1))  # b s h n+v
        if layout.buckets is not None:
            turns = rotations.expand(*x.shape[:2], -1)  # b s r/2
            flat = (tensor.flatten(0, 1) for tensor in (q, kv, k_rot, turns))  # b s .. -> N ..
            full = (unfold(tensor, layout.packed) for tensor in flat)
            o = CausalAttention.apply(*full, self.rope, self.scale, layout.buckets)  # N h v
            o = fold(o, layout.packed).unflatten(0, x.shape[:2])  # b s h v
        else:
            q, q_rot = q.split([self.nope, self.rotary], dim=-1)
            q = torch.cat([q, self.rope.rotate(q_rot, rotations.unsqueeze(-2))], dim=-1)  # b s h n+r
            k, v = kv.split([self.nope, self.value], dim=-1)
            k = torch.cat([k, k_rot.unsqueeze(-2).expand_as(q_rot)], dim=-1)  # b s h n+r
            q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))  # b s .. -> N ..
            o = attend(q, k, v, layout.packed, self.scale).unflatten(0, x.shape[:2])  # b s h v
        return self.o_proj(o.flatten(-2))

    def decode(self, x: Tensor, rotations: Tensor, step: DecodeStep, cache: Tensor) -> Tensor:
        """Absorbed form for new tokens `x` (b s d) at `rotations` (b s r/2), appended to `cache` (T w)."""
        b, s = x.shape[:2]
        q, q_rot = self._query(x.flatten(0, 1)).split([self.nope, self.rotary], dim=-1)  # N h n, N h r
        c, k_rot = self._latent(x, rotations)  # b s c, b s r
        cache.index_copy_(0, step.slots.flatten(), torch.cat([c, k_rot], dim=-1).flatten(0, 1))
        w = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))  # h n+v c
        w_uk, w_uv = w.split([self.nope, self.value], dim=1)
        q = torch.bmm(q.transpose(0, 1), w_uk).transpose(0, 1)  # h N n, h n c -> N h c
        q_rot = self.rope.rotate(q_rot, rotations.flatten(0, 1).unsqueeze(-2))
        q = torch.cat([q, q_rot], dim=-1).unflatten(0, (b, s))  # b s h w
        pages = cache.unflatten(0, (-1, PAGE))
        parts = [self._read(q[g.begin : g.end], pages, g, step.scratch) for g in step.groups]
        o = parts[0] if len(parts) == 1 else torch.cat(parts)  # b s h w
        # Keys and values are the same memory; the r columns of rotary key that come out are dropped.
        o = o.flatten(0, 1)[..., : self.rank].transpose(0, 1)  # h N c
        o = torch.bmm(o, w_uv.transpose(1, 2))  # h N c, h c v -> h N v
        return self.o_proj(o.transpose(0, 1).flatten(-2).unflatten(0, (b, s)))

    def _read(self, q: Tensor, pages: Tensor, group: Group, scratch: Tensor) -> Tensor:
        """Queries `q` (g s h w) over the latents of their rows: (g s h w)."""
        g, s, h, w = q.shape
        n = group.mask.shape[-1]
        copied = scratch[: g * n].view(-1, PAGE, w)
        kv = torch.index_select(pages, 0, group.pages, out=copied).view(g, 1, n, w)
        if s > HEADS_AS_ROWS:
            q, kv = q.transpose(1, 2), kv.expand(g, h, n, w)
            o = F.scaled_dot_product_attention(q, kv, kv, attn_mask=group.mask, scale=self.scale)
            return o.transpose(1, 2)
        mask = group.mask if s == 1 else group.mask.repeat_interleave(h, dim=2)  # g 1 s h, n
        o = F.scaled_dot_product_attention(q.view(g, 1, s * h, w), kv, kv, attn_mask=mask, scale=self.scale)
        return o.view(g, s, h, w)
