"""The cache of decoding: one latent per token and layer, for all heads together, in pages.

Per token MLA keeps the normed key-value latent and the rotated shared key (DeepSeek-V2, arXiv:2405.04434,
Sec. 2.1.2 and 2.1.3), kv_lora_rank + qk_rope_head_dim numbers. They lie in pages of `PAGE` tokens, and a row
(one sequence) is a list of pages (PagedAttention, arXiv:2309.06180, Sec. 4): pages are allocated as rows
grow and freed when they end, and rows with a common prefix share its pages. On request the cache also records
the experts of each token, for replay in training.

Attention reads a few rows at a time, their pages copied side by side. On a CPU the copy stays in the
processor's cache and costs less than reading scattered pages in place, and short rows are read with few
padding columns.

Axes    l layers, T tokens of all pages, w = kv_lora_rank + qk_rope_head_dim, k experts per token;
        b rows of a step, s new tokens of each, n tokens of the longest row of a group
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig

PAGE = 16  # tokens
CPU_BYTES = 3 << 19  # of latents that attention reads together on a CPU: they stay in a core's cache
Rows = NDArray[np.int64]


class LayerCache(NamedTuple):
    """One layer's part, views of its tensors."""

    latent: Tensor  # T w
    routes: Tensor | None  # T k; None for a dense layer, or unless recorded


class Group(NamedTuple):
    """Rows `begin` to `end` of a step, which attention reads together."""

    begin: int
    end: int
    pages: Tensor  # (end - begin) n/PAGE, page numbers, row after row
    mask: Tensor  # end-begin 1 s n, 0 where a new token sees a column, else -inf


class DecodeStep(NamedTuple):
    """Positions, slots and visible columns of a step's new tokens. All layers share it."""

    positions: Tensor  # b s
    slots: Tensor  # b s, flat: index among the T tokens
    groups: list[Group]
    scratch: Tensor  # room for the latents of the largest group


class LatentCache:
    """`latent` (l T w), `routes` (moe layers, T k) or None; and, on the host, which row has which pages.

    Page 0 is the padding page: columns beyond a row's end point to it."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_tokens: int,
        like: Tensor,
        *,
        pages: int | None = None,
        record_routes: bool = False,
        drafts: bool = False,
    ) -> None:
        """Room for `rows` of up to `max_tokens` tokens, all empty; dtype and device as `like`.

        Args:
            pages: of all rows together. None = enough for every row to be full.
            record_routes: record the experts of every token of the trunk.
            drafts: keep the latents of the first MTP module too.

        Raises:
            ValueError: rows longer than the model's positions.
        """
        if max_tokens > (most := config.max_position_embeddings):
            raise ValueError(f"A cache of {max_tokens} tokens is more than max_position_embeddings={most}.")
        a_row = -(-max_tokens // PAGE)
        pages = 1 + (rows * a_row if pages is None else pages)
        # Zeros, not garbage: a masked column still enters the products, and 0 * nan is nan.
        self.latent = _zeros((config.num_hidden_layers + drafts, pages * PAGE, config.latent_dim), like)
        self.routes: Tensor | None = None
        if record_routes:
            layers, k = config.routed_shape
            dtype = route_dtype(config.n_routed_experts)
            self.routes = torch.zeros(layers, pages * PAGE, k, dtype=dtype, device=like.device)
        self.max_tokens = max_tokens
        self.lengths: Rows = np.zeros(rows, dtype=np.int64)  # tokens of each row
        self.held: Rows = np.zeros(rows, dtype=np.int64)  # pages of each row
        self.table: Rows = np.zeros((rows, a_row), dtype=np.int64)
        self.shares: Rows = np.zeros(pages, dtype=np.int64)  # rows that hold each page
        self.free = list(range(pages - 1, 0, -1))

    def layer(self, index: int, dense: int = 0) -> LayerCache:
        """Layer `index` of a model whose first `dense` layers route nothing."""
        at = index - dense
        routes = self.routes[at] if self.routes is not None and 0 <= at < len(self.routes) else None
        return LayerCache(self.latent[index], routes)

    def reserve(self, rows: Rows, new: int) -> bool:
        """Make room for `new` more tokens in each of `rows`; False, and nothing changed, if pages are short.
        Raises `ValueError`: a row would be longer than `max_tokens`."""
        lengths = self.lengths[rows] + new
        if (most := lengths.max(initial=0)) > self.max_tokens:
            raise ValueError(f"The cache is full: a row would hold {most} of {self.max_tokens} tokens.")
        needed = -(-lengths // PAGE) - self.held[rows]
        if needed.clip(0).sum() > len(self.free):
            return False
        for at in np.flatnonzero(needed > 0):
            row = rows[at]
            for _ in range(needed[at]):
                page = self.free.pop()
                self.shares[page] = 1
                self.table[row, self.held[row]] = page
                self.held[row] += 1
        return True

    def fork(self, row: int, copies: Rows, own: int = 0) -> bool:
        """Make the empty rows `copies` continue `row`; False, and nothing changed, if pages are short.

        Full pages are shared, the last one is copied: a row writes to its own pages alone. The last `own`
        tokens (at most one page) are always copied, because the caller overwrites them."""
        length = int(self.lengths[row])
        full = max(length - own, 0) // PAGE
        rest = length - full * PAGE
        if rest and len(copies) > len(self.free):
            return False
        shared = self.table[row, :full]
        self.table[copies, :full] = shared
        self.shares[shared] += len(copies)
        self.held[copies], self.lengths[copies] = full, self.lengths[row]
        if rest:
            self.reserve(copies, 0)
            source = self.table[row, full] * PAGE
            for copy in self.table[copies, full] * PAGE:
                self.latent[:, copy : copy + rest] = self.latent[:, source : source + rest]
                if self.routes is not None:
                    self.routes[:, copy : copy + rest] = self.routes[:, source : source + rest]
        return True

    def release(self, row: int) -> None:
        """Empty a row; pages that no other row holds are free again."""
        pages = self.table[row, : self.held[row]]
        self.shares[pages] -= 1
        self.free.extend(pages[self.shares[pages] == 0].tolist())
        self.lengths[row] = self.held[row] = 0

    def clear(self) -> None:
        """Empty all rows."""
        for counts in (self.lengths, self.held, self.table, self.shares):
            counts.fill(0)
        self.free = list(range(len(self.shares) - 1, 0, -1))

    def append(self, rows: Rows, new: int) -> DecodeStep:
        """Lengthen `rows` by `new` tokens each; return the step that writes them. Sort rows by length.
        Raises `ValueError`: no room for them."""
        begin = self.lengths[rows]
        if not self.reserve(rows, new):
            raise ValueError(f"The cache is full: no page is free for {new} tokens in {len(rows)} rows.")
        self.lengths[rows] += new
        return self.step(rows, begin, new)

    def step(self, rows: Rows, begin: Rows, new: int) -> DecodeStep:
        """The step that writes `new` tokens from position `begin` on in each of `rows`, in reserved slots."""
        at = begin[:, None] + np.arange(new)  # b s
        slots = self.table[rows[:, None], at // PAGE] * PAGE + at % PAGE
        groups, most, last = [], 0, 0
        while last < len(rows):
            first, last = last, min(last + self._together(int(at[last, -1]) + 1), len(rows))
            pages = -(-int(at[first:last, -1].max() + 1) // PAGE)
            most = max(most, (last - first) * pages)
            mask = self._mask(at[first:last], pages * PAGE)
            table = self._tensor(self.table[rows[first:last], :pages].ravel())
            groups.append(Group(first, last, table, mask))
        scratch = self.latent.new_empty(most * PAGE, self.latent.shape[2])
        return DecodeStep(self._tensor(at), self._tensor(slots), groups, scratch)

    def _together(self, tokens: int) -> int:
        """Rows like one of `tokens` that attention reads together."""
        if self.latent.device.type != "cpu":
            return len(self.lengths)
        return max(1, CPU_BYTES // (tokens * self.latent.shape[2] * self.latent.element_size()))

    def _mask(self, at: Rows, columns: int) -> Tensor:
        hidden = torch.from_numpy(np.arange(columns) > at[:, None, :, None])  # rows 1 s n
        mask = torch.zeros(hidden.shape, dtype=self.latent.dtype).masked_fill_(hidden, float("-inf"))
        return mask.to(self.latent.device, non_blocking=True)

    def _tensor(self, values: Rows) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.latent.device, non_blocking=True)

    def slots(self, rows: Rows) -> Tensor:
        """Slots of all tokens of `rows`, row after row."""
        found = []
        for row in rows:
            at = np.arange(self.lengths[row])
            found.append(self.table[row, at // PAGE] * PAGE + at % PAGE)
        return self._tensor(np.concatenate(found))

    def routed_experts(self, row: int) -> Tensor:
        """Expert ids of a row's tokens (length, moe layers, k), as `Transformer.hidden` replays them."""
        if self.routes is None:
            raise ValueError("This cache records no routes: make it with new_cache(.., record_routes=True).")
        return self.routes[:, self.slots(np.array([row]))].transpose(0, 1)


def bytes_per_page(config: ModelConfig, itemsize: int, drafts: bool = False, routes: bool = False) -> int:
    """Memory of a page over all layers; 70,272 bytes a token for DeepSeek-V3's latents in bf16."""
    latents = (config.num_hidden_layers + drafts) * config.latent_dim * itemsize
    experts = math.prod(config.routed_shape) * route_dtype(config.n_routed_experts).itemsize
    return PAGE * (latents + experts * routes)


def route_dtype(experts: int) -> torch.dtype:
    """The smallest type of the ids 0 .. `experts` - 1: DeepSeek-V3's 58 x 8 a token take 464 bytes."""
    return torch.uint8 if experts <= 256 else torch.int16


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """As `like.new_zeros`; on a CPU the system allocates pages when they are first written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = int(np.prod(shape)) * like.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(*shape)
