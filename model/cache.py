"""What decoding remembers: one latent per token and layer, for all heads together.

Per token MLA keeps the normed key-value latent and the rotated shared key (DeepSeek-V2, arXiv:2405.04434,
Sec. 2.1.2 and 2.1.3), kv_lora_rank + qk_rope_head_dim numbers, and each row's length. Memory is taken once;
rows are copied or dropped with `select`, so one prompt can become a group of rollouts and finished rollouts
make room. On request it also keeps which experts each token went to, for replay in training.

Axes    l layers, b rows, T capacity in tokens, w = kv_lora_rank + qk_rope_head_dim, k experts per token
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's part, views into the whole."""

    latent: Tensor  # b T w
    routes: Tensor | None  # b T k; None for a dense layer, or where nobody asked


class LatentCache:
    """`latent` (l b T w), `lengths` (b) the tokens each row holds, `routes` (moe layers, b T k) or None."""

    def __init__(self, latent: Tensor, routes: Tensor | None, lengths: Tensor, longest: int) -> None:
        self.latent, self.routes, self.lengths = latent, routes, lengths
        self.longest = longest  # max of lengths, kept on the host: asking a GPU for it would stall every step
        dense = len(latent) - len(routes) if routes is not None else len(latent)
        self.layers = [
            LayerCache(latent[i], routes[i - dense] if routes is not None and i >= dense else None)
            for i in range(len(latent))
        ]

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, max_tokens: int, like: Tensor, record_routes: bool
    ) -> "LatentCache":
        """Room for `max_tokens` tokens in each of `batch` rows; dtype and device as `like`."""
        if max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"A cache of {max_tokens} tokens is more than max_position_embeddings="
                f"{config.max_position_embeddings}."
            )
        # Zeros, not garbage: a masked column still enters the products, and 0 * nan is nan.
        latent = like.new_zeros(config.num_hidden_layers, batch, max_tokens, config.latent_dim)
        routes = None
        if record_routes:
            layers = config.num_hidden_layers - config.first_k_dense_replace
            shape = (layers, batch, max_tokens, config.num_experts_per_tok)
            routes = torch.full(shape, -1, dtype=torch.int16, device=like.device)
        return cls(latent, routes, torch.zeros(batch, dtype=torch.long, device=like.device), 0)

    @property
    def max_tokens(self) -> int:
        """Capacity of a row."""
        return self.latent.shape[2]

    def select(self, rows: Tensor) -> "LatentCache":
        """A new cache of the given rows (n), in that order; a row may be taken any number of times."""
        lengths = self.lengths[rows]
        longest = int(lengths.max()) if len(rows) else 0
        latent = self.latent.new_zeros(self.latent.shape[0], len(rows), *self.latent.shape[2:])
        for new, old in zip(latent, self.latent, strict=True):
            new[:, :longest] = old[:, :longest].index_select(0, rows)
        routes = self.routes if self.routes is None else self.routes[:, rows]
        return LatentCache(latent, routes, lengths, longest)

    def routed_experts(self) -> Tensor:
        """Expert ids of all tokens (b, longest, moe layers, k), as `Transformer.hidden` replays them."""
        if self.routes is None:
            raise ValueError("This cache records no routes: make it with new_cache(.., record_routes=True).")
        return self.routes[:, :, : self.longest].permute(1, 2, 0, 3)


class DecodeStep(NamedTuple):
    """What all layers of one decoding step share. One new token a row, at the row's own length."""

    rotations: Tensor  # b 1 r/2, complex
    slots: Tensor  # b, where the new token goes in a layer's cache seen as (b T) w
    mask: Tensor  # b 1 1 n, 0 where a column is the row's own, else -inf
    columns: int  # n, cache columns in use by the longest row, the new token included

    @classmethod
    def after(cls, cache: LatentCache, rotations: Tensor) -> "DecodeStep":
        """The step that follows `cache`, with the `rotations` (b r/2) of its lengths."""
        n, lengths = cache.longest + 1, cache.lengths
        beyond = torch.arange(n, device=lengths.device) > lengths[:, None]  # b n
        mask = torch.zeros(beyond.shape, dtype=cache.latent.dtype, device=lengths.device)
        mask.masked_fill_(beyond, float("-inf"))
        slots = torch.arange(len(lengths), device=lengths.device) * cache.max_tokens + lengths
        return cls(rotations[:, None], slots, mask[:, None, None], n)
