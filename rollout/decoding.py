"""The decode loop that the in-process engines share: plan waves of rows, draw them, cut them into rollouts.

An engine brings a `Decoder` for its model; sampling, stopping and bookkeeping are here, so engines agree
token for token. Requests are drawn in waves of similar prompt length. Within a wave all rows decode
together; rows that have stopped go on unread until enough have, then the caches are compacted.

Axes    r rows of a wave; s steps; v vocabulary; p distinct prompts of a wave
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rollout.sampling import sample, uniform_stream
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


def check_prompts(prompts: Sequence[Prompt], max_positions: int, vocab_size: int) -> None:
    """Refuse what cannot be drawn before anything is.

    Raises:
        ValueError: naming the first prompt that is empty, too long, or has an id outside the vocabulary.
    """
    for index, prompt in enumerate(prompts):
        ids = prompt.token_ids
        if not ids:
            raise ValueError(f"prompt {index} has no tokens; a completion needs at least one to start from.")
        if len(ids) > max_positions - 1:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; the model's {max_positions} positions "
                f"(max_position_embeddings) leave room for at most {max_positions - 1}."
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(
                f"prompt {index} has token id {min(ids) if min(ids) < 0 else max(ids)}, outside the model's "
                f"vocabulary of {vocab_size}; is it tokenized for another model?"
            )


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


def is_any(tokens: Tensor, stops: Sequence[int]) -> Tensor:
    """Where `tokens` is one of a few ids. Cheaper than `torch.isin` a step, which sorts."""
    hit = tokens == stops[0]
    for stop in stops[1:]:
        hit |= tokens == stop
    return hit


def refuse_nonfinite(logits: Tensor, step: int, describe: Callable[[int], str]) -> None:
    """Raise `FloatingPointError` naming the first row of `logits` (r v) that has a NaN or an infinity."""
    sound = logits.sum(-1).isfinite()  # one pass; finite logits are far too small for their sum to overflow
    if not sound.all():
        row = int((~sound).nonzero()[0])
        raise FloatingPointError(
            f"logits are NaN or infinite at decode step {step}, row {row} ({describe(row)}); "
            "the weights have diverged: lower the learning rate or go back to an earlier checkpoint."
        )


def draw(
    decoder: Decoder, wave: Wave, token_ids: Sequence[Sequence[int]], sampling: SamplingParams,
    stops: Sequence[int], limits: Sequence[int], device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Decode a wave to its end.

    Args:
        token_ids: the wave's prompts.
        stops: ids that end a row.
        limits: most new tokens, for each row.

    Returns:
        Tokens and log-probabilities, each `s r`; what follows a row's end means nothing.
    """
    steps, r = max(limits), len(limits)
    if sampling.temperature == 0:
        uniforms = torch.zeros(1, 1, device=device).expand(steps, r)  # not read
    else:
        named = zip(wave.slots, wave.samples, strict=True)
        first = sampling.first_index
        streams = [uniform_stream(sampling.seed, first + wave.prompts[slot], s, steps) for slot, s in named]
        uniforms = torch.from_numpy(np.stack(streams, axis=1)).to(device)
    tokens = torch.zeros(steps, r, dtype=torch.long, device=device)
    logprobs = torch.zeros(steps, r, device=device)
    limit = torch.tensor(limits, device=device)
    short = set(limits) - {steps}  # only prompts near the end of the position range have these
    live = torch.arange(r, device=device)
    done = torch.zeros(r, dtype=torch.bool, device=device)
    whole = True  # every row is still there: write whole lines instead of indexing

    def describe(row: int) -> str:
        at = int(live[row])
        return f"prompt {wave.prompts[wave.slots[at]]}, sample {wave.samples[at]}"

    capacity = max(len(token_ids[slot]) + most for slot, most in zip(wave.slots, limits, strict=True))
    logits = decoder.start(token_ids, torch.tensor(wave.slots, device=device), capacity)
    for step in range(steps):
        refuse_nonfinite(logits, step, describe)
        u = uniforms[step] if whole else uniforms[step, live]
        token, logprob = sample(logits, u, sampling)
        if whole:
            tokens[step], logprobs[step] = token, logprob
        else:
            tokens[step, live], logprobs[step, live] = token, logprob
        if step + 1 == steps:
            break
        out_of_room = step + 1 in short
        if stops:
            done |= is_any(token, stops)
        if out_of_room:
            done |= limit[live] == step + 1
        if stops or out_of_room:
            left = done.numel() - int(done.count_nonzero())
            if not left:
                break
            # A row that is out of positions must leave now: the next step would run past them.
            if out_of_room or left <= KEEP_RATIO * done.numel():
                rows = (~done).nonzero().squeeze(1)
                decoder.keep(rows)
                live, token, done, whole = live[rows], token[rows], done[rows], False
        logits = decoder.step(token)
    return tokens, logprobs


def generate(
    module: nn.Module, new_decoder: Callable[[], Decoder], prompts: Sequence[Prompt],
    sampling: SamplingParams, *, stops: Sequence[int], max_positions: int, max_batch: int,
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
                tokens, logprobs = draw(new_decoder(), wave, token_ids, sampling, stops, limits, device)
                rollouts = cut(wave, prompts, tokens, logprobs, stops, limits, version)
        finally:
            if training:
                module.train()
        yield from rollouts


def cut(
    wave: Wave, prompts: Sequence[Prompt], tokens: Tensor, logprobs: Tensor,
    stops: Sequence[int], limits: Sequence[int], version: int,
) -> list[Rollout]:  # fmt: skip
    """Rollouts from the raw draws `s r`: each row up to its first stop token, that included, or its limit."""
    ends = torch.tensor(limits, device=tokens.device)
    stopped = torch.zeros_like(ends, dtype=torch.bool)
    if stops:
        hits = is_any(tokens, stops) & (torch.arange(len(tokens), device=tokens.device).unsqueeze(1) < ends)
        stopped = hits.any(0)
        ends = torch.where(stopped, hits.int().argmax(0) + 1, ends)  # argmax: the first of equals
    drawn = (tokens.T.tolist(), logprobs.T.tolist(), ends.tolist(), stopped.tolist())
    return [
        Rollout(
            prompt=prompts[wave.prompts[slot]],
            index=wave.prompts[slot],
            sample=s,
            token_ids=tuple(row_tokens[:end]),
            logprobs=tuple(row_logprobs[:end]),
            finish_reason="stop" if stop else "length",
            policy_version=version,
        )
        for slot, s, row_tokens, row_logprobs, end, stop in zip(wave.slots, wave.samples, *drawn, strict=True)
    ]


def stop_ids(eos: int | Sequence[int] | None, sampling: SamplingParams) -> list[int]:
    """The ids that end a completion: the request's, and the model's eos unless the request ignores it.

    With `ignore_eos` nothing stops before `max_tokens`, whatever else is asked for.
    """
    if sampling.ignore_eos:
        return []
    own = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return sorted({*sampling.stop_token_ids, *own})
