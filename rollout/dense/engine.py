"""In-process engine for any transformers causal language model.

Prompts are left-padded into waves of similar length and prefilled once for all their samples. Sampling,
stopping and seeds are those of the native engine, so tokens and log-probabilities mean the same.
(transformers' own continuous batching takes 3 to 5 times as long on a CPU, docs/LOG.md.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from model.dense import DensePolicy
from rollout.dense.waves import generate_waves
from rollout.stopping import Stopper, check_prompts
from rollout.types import Prompt, Rollout, SamplingParams
from rollout.weights import InPlaceEngine


class DenseDecoder:
    """`WaveDecoder` over a transformers model and its KV cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def start(self, prompts: Sequence[Sequence[int]], slots: Tensor, capacity: int) -> Tensor:
        """Prefill left-padded prompts (p), expand cache and logits to rows (r)."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        # The mask hides padding, so its id does not matter.
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        device = slots.device
        ids, pads = torch.tensor(padded, device=device), torch.tensor(padding, device=device)
        self.cache = DynamicCache(config=self.model.config)
        self.length = longest
        # Without padding no mask is needed, and attention takes its faster path.
        self.pads: Tensor | None = pads if any(padding) else None
        self.mask: Tensor | None = None
        if any(padding):
            self.mask = (torch.arange(capacity + max(padding), device=device) >= pads.unsqueeze(1)).long()
        logits = self._forward(ids)  # p v
        if len(slots) == len(prompts):
            return logits
        self.keep(slots)
        return logits[slots]  # p v -> r v

    def step(self, tokens: Tensor) -> Tensor:
        """`tokens` (r) in, logits (r v) out."""
        self.length += 1
        return self._forward(tokens.unsqueeze(1))

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows' cache; rows may repeat."""
        self.cache.batch_select_indices(rows)
        if self.pads is not None and self.mask is not None:
            self.pads, self.mask = self.pads[rows], self.mask[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        """Append `ids` (r q), the last of `self.length` columns, and return the last one's logits (r v)."""
        padded = {}
        if self.pads is not None and self.mask is not None:
            columns = torch.arange(self.length - ids.shape[1], self.length, device=ids.device)
            positions = (columns - self.pads.unsqueeze(1)).clamp(min=0)  # r q
            padded = {"attention_mask": self.mask[:, : self.length], "position_ids": positions}
        out = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **padded
        )
        logits: Tensor = out.logits
        return logits[:, -1]


def bytes_per_token(model: PreTrainedModel) -> int:
    """Memory of a token's keys and values over all layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kv_heads * size * model.dtype.itemsize)


class DenseEngine(InPlaceEngine):
    """`RolloutEngine` for a transformers causal language model."""

    policy: DensePolicy

    def __init__(
        self,
        policy: DensePolicy,
        *,
        max_batch: int = 256,
        cache_bytes: int = 4 << 30,
        speculate: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        """
        Args:
            policy: generated from in place.
            max_batch: rows that decode together, at most.
            cache_bytes: largest memory for keys and values, unless a single row needs more.
            speculate: refused; for native models alone.
            eos_token_id: ends a completion; `None` = that of the generation config, which may list several.
            tokenizer: reads stop strings; not needed without them.

        Raises:
            ValueError: speculation.
        """
        if speculate:
            raise ValueError("speculate is for native models with an MTP module; this is a dense model.")
        self.policy = policy
        self.max_batch, self.cache_bytes, self.tokenizer = max_batch, cache_bytes, tokenizer
        generation = policy.network.generation_config
        known = (eos_token_id, generation.eos_token_id if generation else None, policy.config.eos_token_id)
        self.eos_token_id: int | Sequence[int] | None = next((eos for eos in known if eos is not None), None)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield rollouts wave by wave, longest prompts first.

        Raises:
            ValueError: at once, when a prompt is empty, too long, or of another vocabulary, or when stop
                strings meet a model without tokenizer.
            FloatingPointError: when the model's logits are not finite.
        """
        network, config = self.policy.network, self.policy.config
        check_prompts(prompts, config.max_position_embeddings, config.vocab_size)
        return generate_waves(
            self.policy,
            lambda: DenseDecoder(network),
            list(prompts),
            sampling,
            stopper=Stopper(sampling, self.eos_token_id, self.tokenizer),
            max_positions=config.max_position_embeddings,
            max_batch=self.max_batch,
            max_cache_tokens=self.cache_bytes // bytes_per_token(network),
            device=network.device,
            version=self.version,
        )
