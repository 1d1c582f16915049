"""In-process engine for any transformers causal language model: waves of rows that start together.

A request is split into waves of similar prompt length. The prompts of a wave are left-padded and prefilled
once for all their samples; its rows decode together, and rows that have ended go on unread until enough have,
then the cache is compacted. Sampling, stopping and seeds are those of the native engine, so tokens and
log-probabilities mean the same. (transformers' own continuous batching takes 3 to 5 times as long on a CPU,
docs/LOG.md.)

Axes    r rows of a wave; s steps; v vocabulary; p distinct prompts of a wave; q new tokens of a row
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

from model.dense import DensePolicy
from rollout.sampling import refuse_nonfinite, sample, uniform_stream
from rollout.stopping import Completion, Stopper, check_prompts, most_tokens
from rollout.types import Eos, Prompt, Rollout, SamplingParams
from rollout.weights import InPlaceEngine

KEEP_RATIO = 0.9
"""Compact when at most this share of the rows is still running. A lower share computes ended rows for longer,
a higher one copies more often. On the tiny model with 384 rows that end raggedly, 0 (never) takes 1.8 times
as long and 1 (at every chance) 1.2 times."""

GROWTH = 1.5
"""Times its tokens that a cache gets room for when it is full."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for further tokens: transformers' own copies all of them at each.

    `keys` and `values` are the used part of `room`, until another selection of rows takes their place."""

    def __init__(self, capacity: int) -> None:
        """A row will have at most `capacity` tokens."""
        super().__init__()
        self.capacity, self.room = capacity, list[Tensor]()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As of any layer; tensors are (r heads tokens size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used, new = self.get_seq_length(), key_states.shape[2]
        fresh, room = (key_states, value_states), self.room
        held: list[Any] = [self.keys, self.values]
        if not room or room[0].data_ptr() != held[0].data_ptr() or room[0].shape[2] < used + new:
            size = max(used + new, min(self.capacity, int(GROWTH * used)))
            self.room = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in fresh]
            for whole, old in zip(self.room, held if used else (), strict=False):
                whole[:, :, :used] = old
        for whole, added in zip(self.room, fresh, strict=True):
            whole[:, :, used : used + new] = added
        self.keys, self.values = (whole[:, :, : used + new] for whole in self.room)
        return self.keys, self.values


class DenseDecoder:
    """A transformers model and its KV cache for one wave of rows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def start(self, prompts: Sequence[Sequence[int]], slots: Tensor, capacity: int) -> Tensor:
        """Prefill each prompt (p) once, row i continuing prompt `slots[i]`: next-token logits (r v).

        No row will have more than `capacity` tokens, prompt included."""
        self.length = max(map(len, prompts))
        padding = [self.length - len(prompt) for prompt in prompts]
        # The mask hides padding, so its id does not matter.
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        device = slots.device
        ids, pads = torch.tensor(padded, device=device), torch.tensor(padding, device=device)
        self.cache = DynamicCache(config=self.model.config)
        layers: list[Any] = self.cache.layers
        columns = capacity + max(padding)
        layers[:] = [RoomyLayer(columns) if type(layer) is DynamicLayer else layer for layer in layers]
        # Without padding no mask is needed, and attention takes its faster path.
        self.pads: Tensor | None = pads if any(padding) else None
        self.mask: Tensor | None = None
        if any(padding):
            self.mask = (torch.arange(columns, device=device) >= pads.unsqueeze(1)).long()
        logits = self._forward(ids)  # p v
        if len(slots) == len(prompts):
            return logits
        self.keep(slots)
        return logits[slots]  # p v -> r v

    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` (r), one to every row: next-token logits (r v)."""
        self.length += 1
        return self._forward(tokens.unsqueeze(1))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; rows may repeat."""
        self.cache.batch_select_indices(rows)
        if self.pads is not None and self.mask is not None:
            self.pads, self.mask = self.pads[rows], self.mask[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        """Append `ids` (r q), the last of `self.length` columns, and return the last one's logits (r v)."""
        extra = {}
        if self.pads is not None and self.mask is not None:
            columns = torch.arange(self.length - ids.shape[1], self.length, device=ids.device)
            positions = (columns - self.pads.unsqueeze(1)).clamp(min=0)  # r q
            extra = {"attention_mask": self.mask[:, : self.length], "position_ids": positions}
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **extra)
        logits: Tensor = out.logits
        return logits[:, -1]


def bytes_per_token(model: PreTrainedModel) -> int:
    """Memory of a token's keys and values over all layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kv_heads * size * model.dtype.itemsize)


def plan_waves(
    lengths: Sequence[int], n: int, new_tokens: int, max_batch: int, max_cache_tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """Split `n` rows a prompt into waves of (index, sample), longest prompts first.

    What does not fit in memory fails at once. A wave has at most `max_batch` rows and `max_cache_tokens`
    over all of them (one row always passes)."""
    rows = [(i, s) for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)) for s in range(n)]
    at = 0
    while at < len(rows):
        fits = max_cache_tokens // (lengths[rows[at][0]] + new_tokens)
        yield (wave := rows[at : at + max(1, min(max_batch, fits))])
        at += len(wave)


def decode_wave(
    decoder: DenseDecoder,
    rows: list[Completion],
    sampling: SamplingParams,
    stopper: Stopper,
    live_version: Callable[[], int],
) -> None:
    """Decode the rows of a wave until all have ended. Where weights change between two steps, as
    `live_version` then tells, the keys and values of earlier tokens stay those of the old ones."""
    steps, device = max(row.limit for row in rows), decoder.model.device
    if sampling.temperature > 0:
        first = sampling.first_index
        streams = [uniform_stream(sampling.seed, first + row.index, row.sample, steps) for row in rows]
        uniforms = torch.from_numpy(np.stack(streams, axis=1)).to(device)
    prompts = {row.index: row.prompt.token_ids for row in rows}
    slots = {index: slot for slot, index in enumerate(prompts)}
    live = list(range(len(rows)))  # rows in the decoder; some of them may have ended
    capacity = max(len(row.prompt.token_ids) + row.limit for row in rows)
    start = torch.tensor([slots[row.index] for row in rows], device=device)
    version = live_version()
    logits = decoder.start(list(prompts.values()), start, capacity)
    for step in range(steps):
        refuse_nonfinite(logits, lambda i: (step, rows[live[i]].index, rows[live[i]].sample))  # noqa: B023
        if step < stopper.min_tokens:
            logits = stopper.ban(logits, torch.arange(len(live), device=device))
        u = uniforms[step, live] if sampling.temperature > 0 else torch.zeros(len(live), device=device)
        token, logprob = sample(logits, u, sampling)
        out_of_room = False
        for at, new, value in zip(live, token.tolist(), logprob.tolist(), strict=True):
            if not rows[at].ended:
                rows[at].append(new, value, stopper, version)
                out_of_room |= step + 1 == rows[at].limit
        going = [i for i, at in enumerate(live) if not rows[at].ended]
        if not going:
            break
        # A row that is out of positions must leave now: the next step would run past them.
        if out_of_room or len(going) <= KEEP_RATIO * len(live):
            kept = torch.tensor(going, device=device)
            decoder.keep(kept)
            live, token = [live[i] for i in going], token[kept]
        version = live_version()
        logits = decoder.step(token)


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
        eos_token_id: Eos = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        """
        Args:
            policy: generated from in place.
            max_batch: rows that decode together, at most.
            cache_bytes: largest memory for keys and values, unless a single row needs more.
            eos_token_id: ends a completion; `None` = that of the generation config, which may list several.
            tokenizer: reads stop strings; not needed without them.

        Raises:
            ValueError: speculation, which is for native models alone.
        """
        if speculate:
            raise ValueError("speculate is for native models with an MTP module; this is a dense model.")
        if not hasattr(policy.config, "max_position_embeddings"):
            kind = policy.config.model_type
            raise ValueError(f"a {kind} model has no max_position_embeddings, which engine dense needs")
        self.policy = policy
        self.max_batch, self.cache_bytes, self.tokenizer = max_batch, cache_bytes, tokenizer
        generation = policy.network.generation_config
        known = (eos_token_id, generation.eos_token_id if generation else None, policy.config.eos_token_id)
        self.eos_token_id: Eos = next((eos for eos in known if eos is not None), None)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield rollouts wave by wave, longest prompts first.

        Raises:
            ValueError: at once, when a prompt is empty, too long, or of another vocabulary, or when stop
                strings meet a model without tokenizer.
            FloatingPointError: when the model's logits are not finite.
        """
        policy, version, prompts = self.policy, self.version, list(prompts)
        most = policy.config.max_position_embeddings
        check_prompts(prompts, most, policy.config.vocab_size)
        stopper = Stopper(sampling, self.eos_token_id, self.tokenizer)

        def live_version() -> int:
            nonlocal version
            version = self.version if self.renew() else version
            return version

        def generated() -> Iterator[Rollout]:
            lengths = [len(prompt.token_ids) for prompt in prompts]
            room = self.cache_bytes // bytes_per_token(policy.network)
            for wave in plan_waves(lengths, sampling.n, sampling.max_tokens, self.max_batch, room):
                limits = {i: most_tokens(prompts[i], sampling, most) for i, _ in wave}
                rows = [Completion(prompts[i], i, number, limits[i]) for i, number in wave]
                training = policy.training  # between waves the caller may train
                policy.eval()
                try:
                    # Not inference_mode: a table that a model fills on first use must serve training too.
                    with torch.no_grad():
                        decode_wave(DenseDecoder(policy.network), rows, sampling, stopper, live_version)
                finally:
                    policy.train(training)
                yield from (row.rollout() for row in rows)

        return generated()
