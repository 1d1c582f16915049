"""Who is drawn next, and with whose memory: continuous batching over the pages of a latent cache.

A prompt's samples share one prefill: the prompt is read into a row of the cache, samples begin as copies of
that row, the last of them takes the row itself. A row that ends makes room for the next sample at once.
Where pages run out, the row that began last gives its own back and waits; later its prompt and what it has
drawn are read again, and it goes on as if nothing had been (recomputation, arXiv:2309.06180, Sec. 4.5).

Host side only: this file touches no weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.cache import PAGE, LatentCache, Rows
from rollout.sampling import uniform_stream
from rollout.types import Prompt, SamplingParams


@dataclass(slots=True, eq=False)
class Draft:
    """A rollout in the making."""

    prompt: Prompt
    index: int
    sample: int
    limit: int
    """Most tokens it may have."""
    uniforms: NDArray[np.float32] | None
    """One for each token; None when greedy."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    row: int = -1
    """Of the cache; its last token is not in there yet."""
    guess: int = 0
    """Speculation: the token after the last, as the MTP module sees it."""
    ended: bool = False
    stopped: bool = False
    """Ended by a stop token or string, not by its limit."""

    def known(self) -> list[int]:
        """The tokens that its row holds."""
        return [*self.prompt.token_ids, *self.tokens[:-1]]


@dataclass(slots=True, eq=False)
class Group:
    """A prompt, and those of its samples that have not begun."""

    prompt: Prompt
    index: int
    limit: int
    samples: deque[int]
    row: int = -1
    """Of the cache, where the prompt has been read; -1 before."""
    state: Tensor | None = None
    """d, the state of the prompt's last token."""


class Schedule:
    """Rows of one request: waiting, running, and those that gave way."""

    def __init__(
        self,
        cache: LatentCache,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        max_positions: int,
        max_batch: int,
        prefill_tokens: int,
        own: int = 0,
    ) -> None:
        """
        Args:
            cache: of `max_batch` + 1 rows, with pages for one row at its longest at least.
            prefill_tokens: prompts are read together up to so many tokens.
            own: last tokens of a prompt that each sample writes anew, see `LatentCache.fork`.
        """
        self.cache, self.sampling, self.own = cache, sampling, own
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.rows = list(range(max_batch, -1, -1))
        self.waiting = deque(
            Group(prompt, i, most_tokens(prompt, sampling, max_positions), deque(range(sampling.n)))
            for i, prompt in enumerate(prompts)
        )
        self.paused: deque[Draft] = deque()
        self.running: list[Draft] = []
        self.began: list[Draft] = []  # those running, in the order in which they began
        self.preemptions = 0

    def busy(self) -> bool:
        """Whether anything is left to draw."""
        return bool(self.running or self.waiting or self.paused)

    # ---- what begins

    def resumable(self) -> list[Draft]:
        """Rows that gave way and fit in again: given a row of the cache each, to be read into."""
        found: list[Draft] = []
        tokens = pages = 0
        while self.paused and len(self.running) + len(found) < self.max_batch:
            draft = self.paused[0]
            need = len(draft.known())
            if found and tokens + need > self.prefill_tokens:
                break
            if not self._fits(pages + pages_of(need), len(found)):
                break
            tokens, pages = tokens + need, pages + pages_of(need)
            draft.row = self.rows.pop()
            found.append(self.paused.popleft())
        return found

    def readable(self) -> list[Group]:
        """The next prompts to read, as many as there are seats and pages for; each is given a row."""
        seats = self.max_batch - len(self.running)
        found: list[Group] = []
        tokens = pages = 0
        for group in self.waiting:
            if seats <= 0 or (found and tokens + len(group.prompt.token_ids) > self.prefill_tokens):
                break
            if group.row >= 0:  # read before; only the first one waiting can be
                return []
            samples = min(seats, len(group.samples))
            alone = pages_of(len(group.prompt.token_ids))
            need = alone + samples  # each copies the last page
            idle = not found and not self.running
            if not self._fits(pages + need, len(found)) and not (idle and self._fits(alone, 0)):
                break
            seats, tokens, pages = seats - samples, tokens + len(group.prompt.token_ids), pages + need
            group.row = self.rows.pop()
            found.append(group)
        return found

    def begin(self) -> list[tuple[Group, Draft]]:
        """Start samples of the prompts that are read, as many as there are seats and pages for."""
        started: list[tuple[Group, Draft]] = []
        while self.waiting and self.waiting[0].row >= 0:
            group = self.waiting[0]
            seats = self.max_batch - len(self.running) - len(started)
            if seats <= 0:
                break
            last = seats >= len(group.samples)
            drafts = [self._draft(group) for _ in range(min(seats, len(group.samples)))]
            copies = drafts[:-1] if last else drafts
            rows = [self.rows.pop() for _ in copies]
            if not self.cache.fork(group.row, np.array(rows, dtype=np.int64), own=self.own):
                # No pages for copies: one sample takes the row itself, the prompt is read again for the rest.
                self.rows += rows[::-1]
                for draft in drafts[:0:-1]:
                    group.samples.appendleft(draft.sample)
                drafts, copies, rows, last = drafts[:1], [], [], True
            for draft, row in zip(copies, rows, strict=True):
                draft.row = row
            if last:
                drafts[-1].row, group.row = group.row, -1
                if not group.samples:
                    self.waiting.popleft()
            started += [(group, draft) for draft in drafts]
        return started

    def run(self, drafts: Sequence[Draft]) -> None:
        """Put these beside the rows that run. Rows of like length stay together: attention reads them so."""
        self.running += drafts
        self.began += drafts
        self.running.sort(key=lambda draft: -int(self.cache.lengths[draft.row]))

    def _draft(self, group: Group) -> Draft:
        sample, sampling = group.samples.popleft(), self.sampling
        uniforms = None
        if sampling.temperature > 0:
            name = sampling.first_index + group.index
            uniforms = uniform_stream(sampling.seed, name, sample, group.limit)
        return Draft(group.prompt, group.index, sample, group.limit, uniforms)

    def _fits(self, pages: int, more: int) -> bool:
        """Whether so many pages are free, and one more for every row that runs beside `more` others.

        Without that rest a row would be read in, only to give way again a step later.
        """
        running = len(self.running)
        return pages + (running + more if running else 0) <= len(self.cache.free)

    # ---- what ends, or gives way

    def make_room(self, new: int) -> None:
        """Let every running row grow by `new` tokens, at the cost of those that began last."""
        while not self.cache.reserve(self.live(), new):
            holder = self.waiting[0] if self.waiting and self.waiting[0].row >= 0 else None
            if holder is not None:  # nobody's yet: it costs one prefill
                self._give_back(holder.row)
                holder.row, holder.state = -1, None
                continue
            draft = self.began.pop()
            self.running.remove(draft)
            self._give_back(draft.row)
            draft.row = -1
            self.paused.appendleft(draft)
            self.preemptions += 1

    def retire(self) -> list[Draft]:
        """Take out the rows that have ended; their pages are free."""
        ended = [draft for draft in self.running if draft.ended]
        if ended:
            self.running = [draft for draft in self.running if not draft.ended]
            self.began = [draft for draft in self.began if not draft.ended]
            for draft in ended:
                self._give_back(draft.row)
        return ended

    def live(self) -> Rows:
        """Rows of the cache that run, longest first."""
        return np.array([draft.row for draft in self.running], dtype=np.int64)

    def _give_back(self, row: int) -> None:
        self.cache.release(row)
        self.rows.append(row)


def pages_of(tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // PAGE)


def most_tokens(prompt: Prompt, sampling: SamplingParams, max_positions: int) -> int:
    """The longest completion that the request and the model's positions allow."""
    return min(sampling.max_tokens, max_positions - len(prompt.token_ids))
