"""In-process engine for the native model: RL's hot loop.

It draws from the trainer's own weights in place, so an update costs nothing and the engine is never
stale. Each prompt is prefilled once for all its samples; then all rows decode together over the static
latent cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.transformer import Transformer
from rollout.decoding import check_prompts, generate, stop_ids
from rollout.types import Prompt, Rollout, SamplingParams


class NativeDecoder:
    """`rollout.decoding.Decoder` over a `Transformer` and its latent cache."""

    def __init__(self, net: Transformer, pad_token_id: int) -> None:
        self.net, self.pad = net, pad_token_id

    def start(self, prompts: Sequence[Sequence[int]], slots: Tensor, capacity: int) -> Tensor:
        """Prefill right-padded prompts (p), expand cache and logits to rows (r)."""
        lengths = [len(prompt) for prompt in prompts]
        padded = [[*prompt, *[self.pad] * (max(lengths) - len(prompt))] for prompt in prompts]
        cache = self.net.new_cache(len(prompts), capacity)
        hidden = self.net.prefill(
            torch.tensor(padded, device=slots.device), torch.tensor(lengths, device=slots.device), cache
        )  # p d
        logits = self.net.lm_head(hidden)  # p d -> p v
        if len(slots) == len(prompts):  # one sample a prompt: already in order, and a copy would be large
            self.cache = cache
            return logits
        self.cache = cache.select(slots)
        return logits[slots]  # p v -> r v

    def step(self, tokens: Tensor) -> Tensor:
        """`tokens` (r) in, logits (r v) out."""
        return self.net.lm_head(self.net.decode(tokens, self.cache))

    def keep(self, rows: Tensor) -> None:
        """Compact the cache."""
        self.cache = self.cache.select(rows)


class NativeEngine:
    """`RolloutEngine` for the native `Transformer`."""

    def __init__(
        self,
        net: Transformer,
        *,
        max_batch: int = 512,
        max_cache_tokens: int = 1 << 20,
        pad_token_id: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            net: drawn from in place: whatever its weights are when a wave starts.
            max_batch: rows that decode together.
            max_cache_tokens: latent-cache tokens over all rows; bounds memory where completions are long.
            pad_token_id: fills prompts of a wave to one length; never attended to.
            eos_token_id: ends a completion; `None` = the model config's.
        """
        self.net, self.version = net, 0
        self.max_batch, self.max_cache_tokens, self.pad_token_id = max_batch, max_cache_tokens, pad_token_id
        self.eos_token_id = net.config.eos_token_id if eos_token_id is None else eos_token_id

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield rollouts wave by wave, longest prompts first.

        Raises:
            ValueError: at once, when a prompt is empty, too long, or of another vocabulary.
            FloatingPointError: when the model's logits are not finite.
        """
        check_prompts(prompts, self.net.config.max_position_embeddings, self.net.config.vocab_size)
        return generate(
            self.net,
            lambda: NativeDecoder(self.net, self.pad_token_id),
            list(prompts),
            sampling,
            stops=stop_ids(self.eos_token_id, sampling),
            max_positions=self.net.config.max_position_embeddings,
            max_batch=self.max_batch,
            max_cache_tokens=self.max_cache_tokens,
            device=self.net.lm_head.weight.device,
            version=self.version,
        )

    def load_weights(self, source: Transformer, version: int) -> None:
        """Draw from `source` from now on: a module, in place; nothing is copied."""
        self.net, self.version = source, version

    def close(self) -> None:
        """Nothing to free: caches live as long as their wave."""
