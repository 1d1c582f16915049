"""Which rows make which micro-batch, settled before training starts.

A distilled student and its control must see equally many tokens in equally many updates, though a trace
is several times as long as a plain answer. So a micro-batch is a budget of tokens, not a count of rows;
`plan` deals rows out until the budget is met, over as many passes as that takes. Rows of a batch have
similar lengths, because a CPU has no variable-length attention: packing rows end to end would build a
mask over the whole pack, and padding costs less (under 5 % here).

Units   lengths and budgets in tokens, prompt and completion together
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 16  # micro-batches whose rows are sorted together: fewer pad more, more mix less
IGNORE = -100  # label of a token outside the loss; torch's cross-entropy and TRL agree on it


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]
    """With the stop token; only these are in the loss."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def endless(count: int, rng: random.Random) -> Iterator[int]:
    """0 .. count - 1 in a new order each pass."""
    while True:
        yield from rng.sample(range(count), count)


def plan(lengths: Sequence[int], micro_batches: int, budget: int, seed: int) -> list[list[int]]:
    """Deal rows into `micro_batches` of about `budget` tokens each.

    The sum over any number of whole windows is off the budget by less than one row, so two corpora planned
    with the same numbers train on the same number of tokens.

    Args:
        lengths: tokens of each row.
        micro_batches: how many are wanted.
        budget: tokens a micro-batch, padding not counted; at least the longest row.
        seed: of the order.

    Returns:
        Row numbers of each micro-batch; a row comes back in a later pass when the corpus runs out.
    """
    if not lengths or max(lengths) > budget:
        raise ValueError(f"{len(lengths)} rows of up to {max(lengths, default=0)} tokens, budget {budget}.")
    rng = random.Random(f"batches/{seed}")
    rows = endless(len(lengths), rng)
    batches: list[list[int]] = []
    used = 0
    while len(batches) < micro_batches:
        width = min(WINDOW, micro_batches - len(batches))
        target = budget * (len(batches) + width)
        window = []
        while used < target:
            window.append(next(rows))
            used += lengths[window[-1]]
        cut = cut_evenly(sorted(window, key=lambda row: lengths[row]), lengths, width)
        rng.shuffle(cut)  # or every window would go from short to long
        batches += cut
    return batches


def cut_evenly(window: list[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Cut the rows, in order, into `width` non-empty runs of nearly equal token counts."""
    left = sum(lengths[row] for row in window)
    runs: list[list[int]] = []
    start = 0
    for remaining in range(width, 0, -1):
        end, tokens = start, 0
        while end < len(window) - (remaining - 1) and (end == start or tokens < left / remaining):
            tokens += lengths[window[end]]
            end += 1
        runs.append(window[start:end])
        start, left = end, left - tokens
    return runs


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Rows side by side, padded on the right: input_ids, labels, attention_mask, each b x t."""
    width = max(map(len, examples))
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for i, example in enumerate(examples):
        p, n = len(example.prompt_ids), len(example)
        ids[i, :n] = torch.tensor(example.prompt_ids + example.completion_ids)
        labels[i, p:n] = ids[i, p:n]
        mask[i, :n] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
