"""Packing: sequences of any length end to end in rows of equal length, each token with its share of the loss.

Every per-token array is aligned with the token that it is about: `weights[r, t]` is the share of the
global loss that predicting token `t` of row `r` (from the state at `t - 1`) has, and 0 for prompts,
padding and the first token of a sequence. Shares are fixed here, once, from all of the global batch;
micro-batches, padding and packing cannot change the loss afterwards.

Axes  r rows of a batch, l tokens of a row
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import UserError

Per = Literal["rollout", "token", "constant"]
"""What a policy loss averages over, see `rollout_weights`."""

Encoded = tuple[list[int], list[bool]]
"""Token ids, and which of them are scored."""

PADDING = -1
"""Sequence id of padding; tokens attend only within their own id."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on; the arrays are as long as `token_ids`."""

    token_ids: Sequence[int]
    weights: Sequence[float]
    rollout_logprobs: Sequence[float] = ()
    advantage: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows. All tensors are `r l`."""

    token_ids: Tensor
    positions: Tensor
    sequence_ids: Tensor
    weights: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor

    def micro_batches(self, rows: int) -> Iterator["Batch"]:
        """The batch in parts of at most `rows` rows."""
        for start in range(0, self.token_ids.shape[0], rows):
            yield Batch(*(getattr(self, name)[start : start + rows] for name in self.__slots__))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a policy reads."""
        return self.token_ids, self.positions, self.sequence_ids

    @property
    def scored(self) -> Tensor:
        """Mask `r l-1` over states: the next token has weight."""
        return self.weights[:, 1:] != 0

    def at_scored(self, values: Tensor) -> Tensor:
        """`values` (r l) of the tokens that have weight, `n`."""
        return values[:, 1:][self.scored]

    @property
    def sequence_index(self) -> Tensor:
        """`r l`: index of each token's sequence in the batch, row after row; padding continues the last."""
        starts = (self.positions == 0) & (self.sequence_ids != PADDING)
        return (starts.flatten().cumsum(0) - 1).view_as(starts)

    def sequences(self) -> int:
        """Sequences, padding left out."""
        return int(self.sequence_index[-1, -1]) + 1

    def tokens(self) -> int:
        """Real tokens, padding left out."""
        return int((self.sequence_ids != PADDING).sum())


def assign_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of the sequences that share a row: first-fit decreasing, so the same lengths pack the same way.

    Raises:
        UserError: a sequence is longer than a row.
    """
    if (longest := max(lengths, default=0)) > row_tokens:
        raise UserError(
            f"a sequence of {longest} tokens does not fit a row of {row_tokens}; raise row_tokens"
        )
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        r = next((r for r, free in enumerate(room) if lengths[i] <= free), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


def pack(examples: Sequence[Example], row_tokens: int) -> Batch:
    """Examples in as few rows of `row_tokens` as first-fit finds."""
    rows = assign_rows([len(e.token_ids) for e in examples], row_tokens)
    shape = (len(rows), row_tokens)
    token_ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    sequence_ids = torch.full(shape, PADDING)
    weights, logprobs, advantages = (torch.zeros(shape) for _ in range(3))
    for r, members in enumerate(rows):
        at = 0
        for number, example in enumerate(examples[i] for i in members):
            span = slice(at, at + len(example.token_ids))
            token_ids[r, span] = torch.tensor(example.token_ids)
            positions[r, span] = torch.arange(len(example.token_ids))
            sequence_ids[r, span] = number
            weights[r, span] = torch.tensor(example.weights, dtype=torch.float)
            weights[r, at] = 0.0  # nothing precedes a sequence's first token
            if example.rollout_logprobs:
                logprobs[r, span] = torch.tensor(example.rollout_logprobs, dtype=torch.float)
            advantages[r, span] = example.advantage
            at = span.stop
    return Batch(token_ids, positions, sequence_ids, weights, logprobs, advantages)


def mean_weights(scored: Sequence[Sequence[bool]]) -> list[list[float]]:
    """Weights of a mean over all scored tokens of the batch; a sequence's first token cannot be scored."""
    total = sum(sum(flags[1:]) for flags in scored)
    return [[0.0, *(float(flag) / max(total, 1) for flag in flags[1:])] for flags in scored]


def pack_supervised(texts: Sequence[Encoded], row_tokens: int) -> Batch:
    """Texts whose loss is the mean over all scored tokens."""
    weights = mean_weights([scored for _, scored in texts])
    return pack([Example(ids, w) for (ids, _), w in zip(texts, weights, strict=True)], row_tokens)


def rollout_weights(lengths: Sequence[int], per: Per, max_tokens: int) -> list[float]:
    """Share of the loss that each token of a rollout has, one number a rollout.

    Args:
        lengths: completion tokens of every rollout of the update, those without advantage included:
            they count in the denominator.
        per: `rollout` averages within a rollout, then over rollouts (GRPO, arXiv:2402.03300, Eq. 3); `token`
            averages over all tokens (DAPO, arXiv:2503.14476, Eq. 8); `constant` divides by a constant a
            rollout (Dr. GRPO, arXiv:2503.20783, Sec. 3.2).
        max_tokens: that constant, the longest completion.
    """
    n, total = len(lengths), sum(lengths)
    if per == "rollout":
        return [1 / (n * length) for length in lengths]
    return [1 / (total if per == "token" else n * max_tokens) for _ in lengths]
