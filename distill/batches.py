"""Which rows make which micro-batch, settled before training starts.

A distilled student and its control train on equally many tokens in equally many updates, though a trace is
several times as long as a plain answer. So a micro-batch is a budget of tokens, not a count of rows; `plan`
adds rows until the budget is met, in several passes if needed. Rows of a batch have similar lengths: a CPU
has no variable-length attention, so rows packed end to end would need a mask over the pack, and padding costs
less (under 5 % here).

Units   lengths and budgets in tokens, prompt and completion together
"""

import itertools
import math
import random
from collections.abc import Sequence

WINDOW = 16  # micro-batches whose rows are sorted together: fewer pad more, more mix less
IGNORE = -100  # label of a token outside the loss; torch's cross-entropy and TRL agree on it


def plan(lengths: Sequence[int], micro_batches: int, budget: int, seed: int) -> list[list[int]]:
    """Row numbers of `micro_batches` of about `budget` tokens each, padding not counted. The sum over any
    number of complete windows is off the budget by less than one row, so two corpora planned with the same
    numbers train on the same number of tokens. Each pass over the rows has a new order. Raises `ValueError`:
    no rows, or one that exceeds the budget."""
    if not lengths or max(lengths) > budget:
        raise ValueError(f"{len(lengths)} rows of up to {max(lengths, default=0)} tokens, budget {budget}.")
    rng = random.Random(f"batches/{seed}")
    rows = itertools.chain.from_iterable(rng.sample(range(n), n) for n in itertools.repeat(len(lengths)))
    batches: list[list[int]] = []
    used = 0
    while len(batches) < micro_batches:
        width = min(WINDOW, micro_batches - len(batches))
        target = budget * (len(batches) + width)
        window = []
        while used < target:
            window.append(next(rows))
            used += lengths[window[-1]]
        cut = cut_evenly(sorted(window, key=lengths.__getitem__), lengths, width)
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


def once(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of about `budget` tokens with every row once, rows of similar lengths together."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return cut_evenly(order, lengths, min(len(order), math.ceil(sum(lengths) / budget)))
