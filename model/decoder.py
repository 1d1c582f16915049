"""One decoder layer: attention and feed-forward, each on the normed residual stream.

    x = x + attention(norm(x))        x = x + ffn(norm(x))

The feed-forward is dense in the first layers and a mixture of experts in the rest (DeepSeek-V3,
arXiv:2412.19437, Sec. 4.2).

Axes    b rows, s tokens, d width, r rotated dimensions, k experts per token
"""

from torch import Tensor, nn

from model.attention import Attention
from model.cache import DecodeStep, LayerCache
from model.config import ModelConfig
from model.kernels.layout import Layout
from model.layers import MLP, RMSNorm
from model.moe import MoE
from model.rope import Rope


class DecoderLayer(nn.Module):
    """Layer `index` of the network; MTP modules count on from the trunk."""

    def __init__(self, config: ModelConfig, index: int, rope: Rope) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rope)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = index >= config.first_k_dense_replace
        self.mlp = MoE(config) if self.is_moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, layout: Layout, recorded: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """`x` (b s d), with an engine's `recorded` experts (b s k); kept in `cache` at `layout.slots`."""
        latent = None if cache is None else cache.latent
        x = x + self.self_attn(self.input_layernorm(x), layout, latent)
        u = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(u)
        y, ids = self.mlp(u, layout, recorded)
        if cache is not None and cache.routes is not None and layout.slots is not None:
            cache.routes[layout.slots] = ids.to(cache.routes.dtype)
        return x + y

    def decode(self, x: Tensor, rotations: Tensor, step: DecodeStep, cache: LayerCache) -> Tensor:
        """New tokens `x` (b s d) at `rotations` (b s r/2), appended to `cache`."""
        x = x + self.self_attn.decode(self.input_layernorm(x), rotations, step, cache.latent)
        u = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(u)
        y, ids = self.mlp(u)
        if cache.routes is not None:
            cache.routes[step.slots.flatten()] = ids.to(cache.routes.dtype)
        return x + y
