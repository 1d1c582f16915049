"""Packing: sequences of any length end to end in micro-batches of a budget of tokens, without padding.

Each token's share of the global loss is fixed here, once, from all of the global batch: micro-batches and
packing cannot change the loss afterwards. A share is 0 for prompts and for the first token of a sequence,
which nothing precedes. Batches stay on the host as arrays; a micro-batch is built when it is computed.

Samples of one prompt that say so (`Example.prefix`) stay together, and the row has their prompt once.

Axes  t tokens of a micro-batch, n those that have weight
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from model.kernels.packed import Packed, upload

Per = Literal["rollout", "token", "constant"]
"""What a policy loss averages over, see `rollout_weights`."""

UNFOLDED = 4
"""Times `micro_tokens` that the sequences of a micro-batch may have in full, where prompts are shared:
attention keeps queries, keys and values of all of them for the backward."""

Encoded = tuple[Sequence[int] | NDArray[Any], Sequence[bool] | NDArray[Any]]
"""Token ids, and which of them are scored."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on; what has a value a token is a list or an array as long as `token_ids`."""

    token_ids: Sequence[int] | NDArray[Any]
    weights: ArrayLike
    rollout_logprobs: ArrayLike | None = None
    advantage: float = 0.0
    routed_experts: Any = None
    """`Rollout.routed_experts`: of all tokens but the last."""
    prefix: int = 0
    """Leading tokens that a row has once for this sequence and those beside it that begin alike."""

    def common(self, before: "Example | None") -> int:
        """Tokens of the row that it takes from the sequence before it in a micro-batch."""
        p = self.prefix
        if before is None or p != before.prefix:
            return 0
        return p if np.array_equal(self.token_ids[:p], before.token_ids[:p]) else 0


def prefixes(examples: Sequence[Example]) -> list[int]:
    """Tokens that each of a micro-batch's sequences takes from the one before it."""
    return [e.common(before) for e, before in zip(examples, [None, *examples], strict=False)]


@dataclass(frozen=True, slots=True)
class Micro:
    """Sequences of one forward and backward, on a device."""

    token_ids: Tensor  # 1 t
    packed: Packed
    scored: Tensor  # n, places in the row of the tokens that have weight
    weights: Tensor  # n
    rollout_logprobs: Tensor  # n
    advantages: Tensor  # n
    positions: NDArray[Any]  # n, on the host: of the scored tokens in their own sequences
    before: Tensor  # n, places in the row of the tokens before those
    routed_experts: Tensor | None = None  # 1 t layers k, int16; -1 = not recorded

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> "Micro":
        """The sequences of `examples`, in their order."""
        lengths, common = [len(e.token_ids) for e in examples], np.array(prefixes(examples), np.int64)
        ends = np.cumsum(lengths - common)  # in the row
        starts, base = ends - lengths + common, np.zeros_like(ends)
        for i, p in enumerate(common):
            base[i] = base[i - 1] if p else starts[i]  # where its first token is
        parts = list(zip(examples, common, strict=True))
        weights = np.concatenate([np.asarray(e.weights, np.float32)[p:] for e, p in parts])
        weights[starts[common == 0]] = 0.0
        scored = np.flatnonzero(weights)
        sequence = np.searchsorted(ends, scored, side="right")
        logprobs = np.zeros(len(weights), np.float32)
        for (e, p), begin, end in zip(parts, starts, ends, strict=True):
            if e.rollout_logprobs is not None:
                logprobs[begin:end] = np.asarray(e.rollout_logprobs)[p:]
        advantages = np.array([e.advantage for e in examples], np.float32)
        token_ids = np.concatenate([np.asarray(e.token_ids, np.int64)[p:] for e, p in parts])[None]
        before = np.where(scored == starts[sequence], base[sequence] + common[sequence], scored) - 1
        arrays = (token_ids, scored, weights[scored], logprobs[scored], advantages[sequence], before)
        ids, places, shares, sampled, each, prior = (upload(torch.from_numpy(x), device) for x in arrays)
        packed, positions = Packed.of(lengths, device, common.tolist()), scored - starts[sequence]
        recorded = recorded_routes(examples, ends)
        routes = None if recorded is None else upload(recorded, device)
        positions += common[sequence]
        return cls(ids, packed, places, shares, sampled, each, positions, prior, routes)

    def ahead(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """States that predict the scored tokens `k` further: index, that token's id and weight (m <= n). More
        than 1 is for rows without shared prefixes."""
        places, weights = self.scored, self.weights
        if k == 1:
            return self.before, self.token_ids[0, places], weights
        kept = upload(torch.from_numpy(np.flatnonzero(self.positions >= k)), places.device)
        places, weights = places[kept], weights[kept]
        return places - k, self.token_ids[0, places], weights

    @property
    def rollout(self) -> Tensor:
        """Number of each scored token's sequence, `n`."""
        return self.packed.index[self.scored]


def recorded_routes(examples: Sequence[Example], ends: NDArray[Any]) -> Tensor | None:
    """`Micro.routed_experts` of sequences that end at `ends` in the row; None where no route is recorded."""
    each = zip(examples, ends, prefixes(examples), strict=True)
    found = [(e.routed_experts, end, p) for e, end, p in each if e.routed_experts is not None]
    if not found:
        return None
    routes = torch.full((1, int(ends[-1]), *found[0][0].shape[1:]), -1, dtype=torch.int16)
    for of, end, p in found:
        routes[0, end - 1 - len(of) + p : end - 1] = of[p:]
    return routes


@dataclass(frozen=True, slots=True)
class Batch:
    """What one update trains on, in micro-batches."""

    parts: list[list[Example]]

    def micro_batches(self, device: torch.device | str = "cpu") -> Iterator[Micro]:
        """One after the other; the same every time."""
        return (Micro.of(part, device) for part in self.parts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence in its row: of a shared prefix, those of the first."""
        both = ((part, prefixes(part)) for part in self.parts)
        return [len(e.token_ids) - p for part, common in both for e, p in zip(part, common, strict=True)]

    @property
    def scored(self) -> int:
        """Tokens that have weight."""
        return sum(int(np.count_nonzero(np.asarray(e.weights)[1:])) for part in self.parts for e in part)


def assign(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch: as even as the longest-first rule makes them.

    A micro-batch has at most `micro_tokens`, or one sequence that is longer."""
    least = sum(min(n, micro_tokens) for n in lengths)
    bins: list[list[int]] = [[] for _ in range(-(-least // micro_tokens))]
    emptiest = [(0, b) for b in range(len(bins))]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        used, b = emptiest[0]
        if used and used + lengths[i] > micro_tokens:
            used, b = 0, len(bins)
            bins.append([])
            heapq.heappush(emptiest, (lengths[i], b))
        else:
            heapq.heapreplace(emptiest, (used + lengths[i], b))
        bins[b].append(i)
    return [members for members in bins if members]


def pack(examples: Sequence[Example], micro_tokens: int) -> Batch:
    """Examples in micro-batches of at most `micro_tokens`; a longer sequence is one by itself. Neighbours
    with a common prefix stay together, as far as they fit; attention, which has each in full, gets at most
    UNFOLDED times as many tokens."""
    units, sizes = list[list[Example]](), list[tuple[int, int]]()  # of a unit: tokens of its row, and in full
    for e in examples:
        common, n = e.common(units[-1][-1]) if units else 0, len(e.token_ids)
        row, full = (sizes[-1][0] + n - common, sizes[-1][1] + n) if common else (n, n)
        if common and row <= micro_tokens and full <= UNFOLDED * micro_tokens:
            units[-1].append(e)
            sizes[-1] = row, full
        else:
            units.append([e])
            sizes.append((n, n))
    parts = assign([max(row, -(-full // UNFOLDED)) for row, full in sizes], micro_tokens)
    return Batch([[e for i in part for e in units[i]] for part in parts])


def mean_weights(scored: Sequence[ArrayLike]) -> list[NDArray[Any]]:
    """Weights of a mean over all scored tokens of the batch; a sequence's first token cannot be scored."""
    flags = [np.array(each, np.float32) for each in scored]  # copies: the first of each changes
    for each in flags:
        each[:1] = 0.0
    total = max(1.0, float(sum(each.sum(dtype=np.float64) for each in flags)))
    return [(each / total).astype(np.float32) for each in flags]


def pack_supervised(texts: Sequence[Encoded], micro_tokens: int) -> Batch:
    """Texts whose loss is the mean over all scored tokens."""
    weights = mean_weights([scored for _, scored in texts])
    return pack([Example(ids, w) for (ids, _), w in zip(texts, weights, strict=True)], micro_tokens)


def rollout_weights(lengths: Sequence[int], per: Per, max_tokens: int) -> list[float]:
    """Share of the loss that each token of a rollout has, one number a rollout.

    Args:
        lengths: completion tokens of every rollout of the update, those without advantage included:
            they count in the denominator; those that the loss leaves out (verifier failed, overlong filter)
            do not.
        per: `rollout` averages within a rollout, then over rollouts (GRPO, arXiv:2402.03300, Eq. 3); `token`
            averages over all tokens (DAPO, arXiv:2503.14476, Eq. 8); `constant` divides by a constant a
            rollout (Dr. GRPO, arXiv:2503.20783, Sec. 3.2).
        max_tokens: that constant, the longest completion.
    """
    n, total = len(lengths), sum(lengths)
    if per == "rollout":
        return [1 / (n * length) for length in lengths]
    return [1 / (total if per == "token" else n * max_tokens) for _ in lengths]
