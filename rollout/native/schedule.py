"""Which rows run next, and with which pages: continuous batching over the pages of a latent cache.

A prompt's samples share one prefill: the prompt is read into a row of the cache, samples begin as copies of
that row, the last of them takes the row itself. A row that ends makes room for the next sample at once.
When pages run out, the row that began last is preempted: its pages are freed, it waits, and later its tokens
are prefilled again, after which it continues unchanged (recomputation, arXiv:2309.06180, Sec. 4.5).

Host side only: this file touches no weights.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.cache import PAGE, LatentCache, Rows
from rollout.sampling import uniform_stream
from rollout.stopping import Completion, most_tokens
from rollout.types import Prompt, SamplingParams


@dataclass(slots=True)
class Stats:
    """Counts of an engine since it was opened or drained."""

    prefilled: int = 0  # tokens: prompts once a group, and rows again after a preemption
    steps: int = 0
    tokens: int = 0  # sampled
    preemptions: int = 0
    guesses: int = 0  # speculation: tokens that the MTP module guessed
    accepted: int = 0  # those that were right
    peak_cache_bytes: int = 0

    def acceptance(self) -> float:
        """Share of guesses that were right."""
        return self.accepted / max(1, self.guesses)


@dataclass(slots=True, eq=False)
class Draft(Completion):
    """A completion with a row of the cache."""

    uniforms: NDArray[np.float32] | None = None  # one for each token; None when greedy
    row: int = -1  # of the cache, which does not hold the last token yet
    guess: int = 0  # speculation: the MTP module's guess for the token after the last

    def known(self) -> list[int]:
        """The tokens that its row holds."""
        return [*self.prompt.token_ids, *self.tokens[:-1]]


@dataclass(slots=True, eq=False)
class Group:
    """A prompt, and its samples that have not begun."""

    prompt: Prompt
    index: int
    limit: int
    samples: deque[int]
    row: int = -1  # of the cache, where the prompt has been read; -1 before
    state: Tensor | None = None  # d, of the prompt's last token


class Schedule:
    """Rows of one request: waiting, running, preempted."""

    def __init__(
        self,
        cache: LatentCache,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        max_positions: int,
        max_batch: int,
        prefill_tokens: int,
        stats: Stats,
        own: int = 0,
    ) -> None:
        """
        Args:
            cache: of `max_batch` + 1 rows, with pages for one row at its longest at least.
            prefill_tokens: prompts are prefilled together up to this number of tokens.
            own: last tokens of a prompt that each sample overwrites, see `LatentCache.fork`.
        """
        self.cache, self.sampling, self.stats, self.own = cache, sampling, stats, own
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.rows = list(range(max_batch, -1, -1))
        self.waiting = deque(
            Group(prompt, i, most_tokens(prompt, sampling, max_positions), deque(range(sampling.n)))
            for i, prompt in enumerate(prompts)
        )
        self.paused: deque[Draft] = deque()
        self.running: list[Draft] = []
        self.began: list[Draft] = []  # those running, in the order in which they began

    def busy(self) -> bool:
        """Whether rollouts are unfinished."""
        return bool(self.running or self.waiting or self.paused)

    # ---- rows that begin

    def resumable(self) -> list[Draft]:
        """Preempted rows that fit again; each gets a cache row to be prefilled."""
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
        """The next prompts to prefill, as many as there are seats and pages for; each gets a cache row."""
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
        """Start samples of the prompts that are prefilled, as many as there are seats and pages for."""
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
                # No pages for copies: one sample takes the row itself, the rest need another prefill.
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
        """Add these to the running rows, sorted by length: attention reads rows of like length together."""
        self.running += drafts
        self.began += drafts
        self.running.sort(key=lambda draft: -int(self.cache.lengths[draft.row]))

    def _draft(self, group: Group) -> Draft:
        number, sampling = group.samples.popleft(), self.sampling
        draft = Draft(group.prompt, group.index, number, group.limit)
        if sampling.temperature > 0:
            index = sampling.first_index + group.index
            draft.uniforms = uniform_stream(sampling.seed, index, number, group.limit)
        return draft

    def _fits(self, pages: int, more: int) -> bool:
        """Whether `pages` are free, and one more for each of the running rows and `more` others.

        Without this reserve a row would be prefilled and preempted again one step later."""
        running = len(self.running)
        return pages + (running + more if running else 0) <= len(self.cache.free)

    # ---- rows that end, or are preempted

    def make_room(self, new: int) -> None:
        """Reserve `new` tokens for every running row; preempt those that began last until the rest fits."""
        while not self.cache.reserve(self.live(), new):
            if not self._forget():
                self._preempt()
                self.stats.preemptions += 1

    def restart(self) -> None:
        """Preempt every row and forget every prefill: the weights that read them have changed."""
        self._forget()
        while self.began:
            self._preempt()

    def _forget(self) -> bool:
        """Free the prompt that is prefilled and whose samples wait, if there is one: it costs one prefill."""
        holder = self.waiting[0] if self.waiting and self.waiting[0].row >= 0 else None
        if holder is None:
            return False
        self._free(holder.row)
        holder.row, holder.state = -1, None
        return True

    def _preempt(self) -> None:
        """Preempt the row that began last."""
        draft = self.began.pop()
        self.running.remove(draft)
        self._free(draft.row)
        draft.row = -1
        self.paused.appendleft(draft)

    def retire(self, ended: Sequence[Draft]) -> None:
        """Take out rows that have ended, and free their pages."""
        if ended:
            self.running = [draft for draft in self.running if not draft.ended]
            self.began = [draft for draft in self.began if not draft.ended]
            for draft in ended:
                self._free(draft.row)

    def live(self) -> Rows:
        """Cache rows of the running drafts, longest first."""
        return np.array([draft.row for draft in self.running], dtype=np.int64)

    def _free(self, row: int) -> None:
        self.cache.release(row)
        self.rows.append(row)


def pages_of(tokens: int) -> int:
    """Pages of a row of `tokens`."""
    return -(-tokens // PAGE)
