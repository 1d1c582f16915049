"""The decode loop for models whose cache is not ours: waves of rows that start together.

An engine brings a `Decoder` for its model. Sampling and stopping are the native engine's, so engines agree
token for token. Requests are drawn in waves of similar prompt length. Within a wave all rows decode
together; rows that have stopped go on unread until enough have, then the caches are compacted.

Axes    r rows of a wave; s steps; v vocabulary; p distinct prompts of a wave
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rollout.sampling import refuse_nonfinite, sample, uniform_stream
from rollout.stopping import Stopper
from rollout.types import Prompt, Rollout, SamplingParams

KEEP_RATIO = 0.9
"""Compact when at most this share of the rows is still running. Lower, and stopped rows are paid for
longer; higher, and copies eat the gain. On the tiny model with 384 rows that end raggedly, 0 (never) takes
1.8 times as long and 1 (at every chance) 1.2 times."""


class Decoder(Protocol):
    """A model and its cache for one wave of rows."""

    def start(self, prompts: Sequence[Sequence[int]], slots: Tensor, capacity: int) -> Tensor:
        """Prefill each prompt once, row i continuing prompt `slots[i]`: next-token logits (r v).

        No row will hold more than `capacity` tokens, prompt included.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every row: next-token logits (r v)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order."""
        ...


@dataclass(frozen=True, slots=True)
class Wave:
    """Rows that decode together: row i is sample `samples[i]` of `prompts[slots[i]]`."""

    prompts: list[int]
    """Places in the request, each once."""
    slots: list[int]
    samples: list[int]


@dataclass(slots=True)
class Drawn:
    """A row of a wave: what it has drawn."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    stopped: bool = False
    """Ended by a stop token or string, not by its limit."""


def plan(
    lengths: Sequence[int], n: int, new_tokens: int, max_batch: int, max_cache_tokens: int
) -> Iterator[Wave]:
    """Cut `n` rows a prompt into waves, longest prompts first: what does not fit in memory fails at once.

    A wave has at most `max_batch` rows, and `max_cache_tokens` over all of them (one row always passes).
    """
    rows = [(i, s) for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)) for s in range(n)]
    at = 0
    while at < len(rows):
        fits = max_cache_tokens // (lengths[rows[at][0]] + new_tokens)
        wave = rows[at : at + max(1, min(max_batch, fits))]
        at += len(wave)
        places = {index: slot for slot, index in enumerate(dict.fromkeys(index for index, _ in wave))}
        yield Wave(list(places), [places[index] for index, _ in wave], [s for _, s in wave])


def draw(
    decoder: Decoder, wave: Wave, token_ids: Sequence[Sequence[int]], sampling: SamplingParams,
    stopper: Stopper, limits: Sequence[int], device: torch.device,
) -> list[Drawn]:  # fmt: skip
    """Decode a wave to its end.

    Args:
        token_ids: the wave's prompts.
        stopper: says when a row ends.
        limits: most new tokens, for each row.
    """
    steps, drawn = max(limits), [Drawn() for _ in limits]
    if sampling.temperature > 0:
        named = zip(wave.slots, wave.samples, strict=True)
        first = sampling.first_index
        streams = [uniform_stream(sampling.seed, first + wave.prompts[slot], s, steps) for slot, s in named]
        uniforms = torch.from_numpy(np.stack(streams, axis=1)).to(device)
    live = list(range(len(limits)))  # rows that the decoder still has; some of them may have ended
    capacity = max(len(token_ids[slot]) + most for slot, most in zip(wave.slots, limits, strict=True))
    logits = decoder.start(token_ids, torch.tensor(wave.slots, device=device), capacity)
    for step in range(steps):
        refuse_nonfinite(logits, lambda i: (step, wave.prompts[wave.slots[live[i]]], wave.samples[live[i]]))  # noqa: B023
        if step < stopper.min_tokens:
            logits = stopper.ban(logits, torch.arange(len(live), device=device))
        u = uniforms[step, live] if sampling.temperature > 0 else torch.zeros(len(live), device=device)
        token, logprob = sample(logits, u, sampling)
        out_of_room = False
        for row, new, value in zip(live, token.tolist(), logprob.tolist(), strict=True):
            if not (state := drawn[row]).ended:
                state.tokens.append(new)
                state.logprobs.append(value)
                state.stopped = stopper.ends(state.tokens)
                state.ended = state.stopped or step + 1 == limits[row]
                out_of_room |= step + 1 == limits[row]
        going = [i for i, row in enumerate(live) if not drawn[row].ended]
        if not going:
            break
        # A row that is out of positions must leave now: the next step would run past them.
        if out_of_room or len(going) <= KEEP_RATIO * len(live):
            rows = torch.tensor(going, device=device)
            decoder.keep(rows)
            live, token = [live[i] for i in going], token[rows]
        logits = decoder.step(token)
    return drawn


def generate(
    module: nn.Module, new_decoder: Callable[[], Decoder], prompts: Sequence[Prompt],
    sampling: SamplingParams, *, stopper: Stopper, max_positions: int, max_batch: int,
    max_cache_tokens: int, device: torch.device, version: int,
) -> Iterator[Rollout]:  # fmt: skip
    """Draw a request wave by wave, longest prompts first.

    `module` is in evaluation mode while a wave is drawn, and as it was between waves: the caller may train
    while it consumes the iterator.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    for wave in plan(lengths, sampling.n, sampling.max_tokens, max_batch, max_cache_tokens):
        room = [min(sampling.max_tokens, max_positions - lengths[index]) for index in wave.prompts]
        limits = [room[slot] for slot in wave.slots]
        token_ids = [prompts[index].token_ids for index in wave.prompts]
        training = module.training
        if training:
            module.eval()
        try:
            # Not inference_mode: a table that a model moves or fills on first use must serve training too.
            with torch.no_grad():
                drawn = draw(new_decoder(), wave, token_ids, sampling, stopper, limits, device)
        finally:
            if training:
                module.train()
        for slot, number, row in zip(wave.slots, wave.samples, drawn, strict=True):
            yield Rollout(
                prompt=prompts[wave.prompts[slot]],
                index=wave.prompts[slot],
                sample=number,
                token_ids=tuple(row.tokens),
                logprobs=tuple(row.logprobs),
                finish_reason="stop" if row.stopped else "length",
                policy_version=version,
            )
