"""The decode loop for models with a cache of their own: waves of rows that start together.

An engine brings a `WaveDecoder` for its model. Sampling and stopping are the native engine's, so engines
agree token for token. A request is split into waves of similar prompt length. Within a wave all rows decode
together; rows that have ended go on unread until enough have, then the caches are compacted.

Axes    r rows of a wave; s steps; v vocabulary; p distinct prompts of a wave
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rollout.sampling import refuse_nonfinite, sample, uniform_stream
from rollout.stopping import Completion, Stopper, most_tokens
from rollout.types import Prompt, Rollout, SamplingParams

KEEP_RATIO = 0.9
"""Compact when at most this share of the rows is still running. A lower share computes ended rows for longer,
a higher one copies more often. On the tiny model with 384 rows that end raggedly, 0 (never) takes 1.8 times
as long and 1 (at every chance) 1.2 times."""


class WaveDecoder(Protocol):
    """A model and its cache for one wave of rows."""

    def start(self, prompts: Sequence[Sequence[int]], slots: Tensor, capacity: int) -> Tensor:
        """Prefill each prompt once, row i continuing prompt `slots[i]`: next-token logits (r v).

        No row will have more than `capacity` tokens, prompt included.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every row: next-token logits (r v)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order."""
        ...


def plan_waves(
    lengths: Sequence[int], n: int, new_tokens: int, max_batch: int, max_cache_tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """Split `n` rows a prompt into waves of (index, sample), longest prompts first.

    What does not fit in memory fails at once. A wave has at most `max_batch` rows and `max_cache_tokens`
    over all of them (one row always passes).
    """
    rows = [(i, s) for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)) for s in range(n)]
    at = 0
    while at < len(rows):
        fits = max_cache_tokens // (lengths[rows[at][0]] + new_tokens)
        yield (wave := rows[at : at + max(1, min(max_batch, fits))])
        at += len(wave)


def decode_wave(
    decoder: WaveDecoder,
    rows: list[Completion],
    sampling: SamplingParams,
    stopper: Stopper,
    device: torch.device,
) -> None:
    """Decode the rows of a wave until all have ended."""
    steps = max(row.limit for row in rows)
    if sampling.temperature > 0:
        first = sampling.first_index
        streams = [uniform_stream(sampling.seed, first + row.index, row.sample, steps) for row in rows]
        uniforms = torch.from_numpy(np.stack(streams, axis=1)).to(device)
    prompts = {row.index: row.prompt.token_ids for row in rows}
    slots = {index: slot for slot, index in enumerate(prompts)}
    live = list(range(len(rows)))  # rows in the decoder; some of them may have ended
    capacity = max(len(row.prompt.token_ids) + row.limit for row in rows)
    start = torch.tensor([slots[row.index] for row in rows], device=device)
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
                rows[at].append(new, value, stopper)
                out_of_room |= step + 1 == rows[at].limit
        going = [i for i, at in enumerate(live) if not rows[at].ended]
        if not going:
            break
        # A row that is out of positions must leave now: the next step would run past them.
        if out_of_room or len(going) <= KEEP_RATIO * len(live):
            kept = torch.tensor(going, device=device)
            decoder.keep(kept)
            live, token = [live[i] for i in going], token[kept]
        logits = decoder.step(token)


def generate_waves(
    module: nn.Module, new_decoder: Callable[[], WaveDecoder], prompts: Sequence[Prompt],
    sampling: SamplingParams, *, stopper: Stopper, max_positions: int, max_batch: int,
    max_cache_tokens: int, device: torch.device, version: int,
) -> Iterator[Rollout]:  # fmt: skip
    """Generate a request wave by wave, longest prompts first.

    `module` is in evaluation mode during a wave and in its former mode between waves: the caller may train
    while it consumes the iterator.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    for wave in plan_waves(lengths, sampling.n, sampling.max_tokens, max_batch, max_cache_tokens):
        limits = {i: most_tokens(prompts[i], sampling, max_positions) for i, _ in wave}
        rows = [Completion(prompts[i], i, number, limits[i]) for i, number in wave]
        training = module.training
        if training:
            module.eval()
        try:
            # Not inference_mode: a table that a model moves or fills on first use must serve training too.
            with torch.no_grad():
                decode_wave(new_decoder(), rows, sampling, stopper, device)
        finally:
            if training:
                module.train()
        yield from (row.rollout(version) for row in rows)
