"""In-process engine for the native model: RL's hot loop.

It draws from the trainer's own weights in place, so an update costs nothing and the engine is never stale.
Rows of any age decode together (continuous batching, `rollout.native.schedule`) over pages of latents
(`model.cache`).

Speculation: the model's MTP module guesses the token after the next, and the trunk reads both at once. A
guess is kept where it is the very token that would have been drawn there: each token is drawn from the
trunk's distribution with the uniform that belongs to its place, guess or no guess. So speculation changes
the cost and not one token, where rejection sampling (arXiv:2302.01318) would keep the distribution only.

Axes    b rows of a step, s new tokens of each (2 with a guess, else 1), d width, v vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.cache import LatentCache, bytes_per_page
from model.transformer import Transformer
from rollout.native.graphs import DecodeGraphs, capturable
from rollout.native.schedule import Draft, Schedule, most_tokens, pages_of
from rollout.sampling import refuse_nonfinite, sample
from rollout.stopping import Stopper, check_prompts
from rollout.types import Prompt, Rollout, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(slots=True)
class Stats:
    """What an engine has done since it was opened, or drained."""

    prefilled: int = 0
    """Tokens read: prompts once a group, and what rows that gave way had to read again."""
    steps: int = 0
    tokens: int = 0
    """Drawn."""
    preemptions: int = 0
    guesses: int = 0
    """Speculation: tokens that the MTP module guessed."""
    accepted: int = 0
    """Those that were right."""
    peak_cache_bytes: int = 0

    def acceptance(self) -> float:
        """Share of guesses that were right."""
        return self.accepted / max(1, self.guesses)


class NativeEngine:
    """`RolloutEngine` for the native `Transformer`."""

    def __init__(
        self,
        net: Transformer,
        *,
        max_batch: int = 512,
        cache_bytes: int = 4 << 30,
        prefill_tokens: int = 4096,
        speculate: bool = False,
        record_routes: bool = False,
        cuda_graphs: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        """
        Args:
            net: drawn from in place: whatever its weights are when a request starts.
            max_batch: rows that decode together.
            cache_bytes: most memory for latents. Rows that it has no room for wait.
            prefill_tokens: prompt tokens that are read at once.
            speculate: guess a token ahead with the first MTP module.
            record_routes: keep every token's experts, for replay in training.
            cuda_graphs: launch a decode step's kernels as one graph where `capturable` allows: bf16 on Hopper
                and Blackwell. Cache and graphs are then kept from request to request.
            eos_token_id: ends a completion; `None` = the model config's.
            tokenizer: reads stop strings; not needed without them.

        Raises:
            ValueError: speculation with a model that has no MTP module.
        """
        if speculate and not len(net.mtp):
            raise ValueError(
                "speculate needs a model with an MTP module (num_nextn_predict_layers >= 1), and this one "
                "has none; switch speculation off."
            )
        self.net, self.version, self.tokenizer = net, 0, tokenizer
        self.max_batch, self.cache_bytes, self.prefill_tokens = max_batch, cache_bytes, prefill_tokens
        self.speculate, self.record_routes = speculate, record_routes
        self.eos_token_id = net.config.eos_token_id if eos_token_id is None else eos_token_id
        self.stats = Stats()
        self.graphs: DecodeGraphs | None = None
        self.cuda_graphs = cuda_graphs

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield each rollout when it ends.

        Raises:
            ValueError: at once, when a prompt is empty, too long, or of another vocabulary, when the cache
                cannot hold the longest rollout, or when stop strings meet a model without tokenizer.
            FloatingPointError: when the model's logits are not finite.
        """
        config = self.net.config
        check_prompts(prompts, config.max_position_embeddings, config.vocab_size)
        stopper = Stopper(sampling, self.eos_token_id, self.tokenizer)
        pages = self._pages(prompts, sampling)
        return self._generate(list(prompts), sampling, stopper, pages)

    def _pages(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> int:
        """Pages of a request: as many as it can use, and as the memory allows."""
        most = self.net.config.max_position_embeddings
        longest = [pages_of(len(p.token_ids) + most_tokens(p, sampling, most)) for p in prompts]
        weight = self.net.norm.weight
        size = bytes_per_page(self.net.config, weight.element_size(), self.speculate, self.record_routes)
        room = self.cache_bytes // size
        if prompts and max(longest) > room:
            worst = longest.index(max(longest))
            raise ValueError(
                f"prompt {worst} with {sampling.max_tokens} new tokens needs {longest[worst] * size:,} bytes "
                f"of cache, and cache_bytes allows {self.cache_bytes:,}; allow more, or lower max_tokens."
            )
        rows = min(self.max_batch, len(prompts) * sampling.n) + 1
        return min(room, rows * max(longest, default=0))

    def _generate(
        self, prompts: list[Prompt], sampling: SamplingParams, stopper: Stopper, pages: int
    ) -> Iterator[Rollout]:
        if prompts:
            # One request, one version: what is loaded meanwhile counts from the next on.
            run = _Run(self, prompts, sampling, stopper, pages)
            while run.schedule.busy():
                # Not inference_mode: a table that a model fills on first use must serve training too.
                with torch.no_grad():
                    ended = run.advance()
                yield from ended

    def load_weights(self, source: Transformer, version: int) -> None:
        """Draw from `source` from now on: a module, in place; nothing is copied."""
        self.net, self.version = source, version

    def drain(self) -> dict[str, float]:
        """Speculation's hits, and rows that gave way for want of memory, where there were any."""
        stats, self.stats = self.stats, Stats()
        out = {"rollout/acceptance": stats.acceptance()} if stats.guesses else {}
        return out | ({"rollout/preemptions": float(stats.preemptions)} if stats.preemptions else {})

    def close(self) -> None:
        """Free what graphs hold; else a cache lives as long as its request."""
        self.graphs = None

    def open_cache(self, rows: int, max_tokens: int, pages: int) -> LatentCache:
        """An empty cache; on a GPU with graphs the last request's, where it fits."""
        if self.graphs is not None and self.graphs.net is self.net:
            kept = self.graphs.cache
            if (len(kept.lengths), kept.max_tokens, len(kept.shares)) == (rows, max_tokens, pages + 1):
                kept.clear()
                return kept
        cache = self.net.new_cache(
            rows, max_tokens, pages=pages, record_routes=self.record_routes, drafts=self.speculate
        )
        self.graphs = DecodeGraphs(self.net, cache) if self.cuda_graphs and capturable(self.net) else None
        return cache


class _Run:
    """One request from its prompts to its last rollout."""

    def __init__(
        self,
        engine: NativeEngine,
        prompts: list[Prompt],
        sampling: SamplingParams,
        stopper: Stopper,
        pages: int,
    ) -> None:
        self.net, self.version, self.stats = engine.net, engine.version, engine.stats
        self.speculate, self.record_routes = engine.speculate, engine.record_routes
        self.sampling, self.stopper = sampling, stopper
        self.device = engine.net.norm.weight.device
        most = engine.net.config.max_position_embeddings
        rows = min(engine.max_batch, len(prompts) * sampling.n)
        longest = max(len(p.token_ids) + most_tokens(p, sampling, most) for p in prompts)
        self.cache = engine.open_cache(rows + 1, longest, pages)
        self.graphs = engine.graphs
        self.schedule = Schedule(
            self.cache, prompts, sampling, most, rows, engine.prefill_tokens, own=int(self.speculate)
        )
        weight = self.net.norm.weight
        self.page_bytes = bytes_per_page(
            self.net.config, weight.element_size(), self.speculate, self.record_routes
        )

    def advance(self) -> list[Rollout]:
        """Begin what there is room for, draw a token or two for every row, and take out what has ended."""
        self._admit()
        ended = self._take_out()
        if self.schedule.running:
            self._step()
            ended += self._take_out()
        elif not ended:
            raise RuntimeError("the schedule is stuck: nothing runs and nothing can begin")
        return ended

    def _admit(self) -> None:
        schedule = self.schedule
        if resumed := schedule.resumable():
            states = self._read([draft.known() for draft in resumed], [draft.row for draft in resumed])
            self._guess_first(states, resumed)
            schedule.run(resumed)
        while True:
            if groups := schedule.readable():
                states = self._read([g.prompt.token_ids for g in groups], [g.row for g in groups])
                for group, state in zip(groups, states, strict=True):
                    group.state = state
            started = schedule.begin()
            if not started:
                return
            drafts = [draft for _, draft in started]
            states = torch.stack([group.state for group, _ in started if group.state is not None])
            self._draw(self.net.lm_head(states), drafts)
            self._guess_first(states, drafts)
            schedule.run(drafts)

    def _read(self, prompts: Sequence[Sequence[int]], rows: list[int]) -> Tensor:
        self.stats.prefilled += sum(map(len, prompts))
        return self.net.prefill(prompts, self.cache, np.array(rows, dtype=np.int64))

    def _step(self) -> None:
        schedule, cache = self.schedule, self.cache
        # A guess needs a place of its own, which the last place of the longest row does not leave.
        fits = self.speculate and int(cache.lengths[schedule.live()].max()) + 2 <= cache.max_tokens
        width = 2 if fits else 1
        schedule.make_room(width)
        drafts, live = schedule.running, schedule.live()
        step = cache.append(live, width)
        tokens = self._tensor([[draft.tokens[-1], draft.guess][:width] for draft in drafts])  # b s
        # b s d
        states = self.graphs.decode(tokens, step) if self.graphs else self.net.decode(tokens, cache, step)
        logits = self.net.lm_head(states)  # b s v
        self._draw(logits[:, 0], drafts)
        self.stats.steps += 1
        if not self.speculate:
            return
        kept = np.zeros(len(drafts), dtype=np.int64)  # guesses of each row that were right, 0 or 1
        if width == 2:
            going = [i for i, draft in enumerate(drafts) if not draft.ended]
            right = [i for i in going if drafts[i].tokens[-1] == drafts[i].guess]
            self.stats.guesses += len(going)
            self.stats.accepted += len(right)
            kept[right] = 1
            if right:
                self._draw(logits[right, 1], [drafts[i] for i in right])
            cache.lengths[live] -= 1 - kept
        # What follows each place; after a wrong guess nothing does, and its place is written anew.
        following = [[*draft.tokens[-1 - n :], 0][:width] for draft, n in zip(drafts, kept, strict=True)]
        guessed = self.net.draft(states, self._tensor(following), cache, step)
        self._guess(guessed[torch.arange(len(drafts)), torch.from_numpy(kept)], drafts)

    def _guess_first(self, states: Tensor, drafts: list[Draft]) -> None:
        """Guess on from prompts just read, `states` (b d): the last place had to wait for its token."""
        if self.speculate:
            rows = np.array([draft.row for draft in drafts], dtype=np.int64)
            step = self.cache.step(rows, self.cache.lengths[rows] - 1, 1)
            following = self._tensor([[draft.tokens[-1]] for draft in drafts])
            self._guess(self.net.draft(states[:, None], following, self.cache, step)[:, 0], drafts)

    def _guess(self, states: Tensor, drafts: list[Draft]) -> None:
        """The module's word, from its `states` (b d), on each row's next token: drawn as that will be."""
        logits = self.net.lm_head(states)
        self._refuse_nonfinite(logits, drafts)
        guesses, _ = sample(logits, self._uniforms(drafts), self.sampling)
        for draft, guess in zip(drafts, guesses.tolist(), strict=True):
            draft.guess = guess

    def _draw(self, logits: Tensor, drafts: list[Draft]) -> None:
        """The next token of every row, from `logits` (b v)."""
        self._refuse_nonfinite(logits, drafts)
        if self.stopper.min_tokens:
            early = [i for i, draft in enumerate(drafts) if len(draft.tokens) < self.stopper.min_tokens]
            logits = self.stopper.ban(logits, self._tensor(early))
        tokens, logprobs = sample(logits, self._uniforms(drafts), self.sampling)
        for draft, token, logprob in zip(drafts, tokens.tolist(), logprobs.tolist(), strict=True):
            draft.tokens.append(token)
            draft.logprobs.append(logprob)
            draft.stopped = self.stopper.ends(draft.tokens)
            draft.ended = draft.stopped or len(draft.tokens) == draft.limit
        self.stats.tokens += len(drafts)

    def _refuse_nonfinite(self, logits: Tensor, drafts: list[Draft]) -> None:
        refuse_nonfinite(logits, lambda i: (len(drafts[i].tokens), drafts[i].index, drafts[i].sample))

    def _uniforms(self, drafts: list[Draft]) -> Tensor:
        numbers = [
            0.0 if d.uniforms is None or len(d.tokens) == d.limit else float(d.uniforms[len(d.tokens)])
            for d in drafts
        ]
        return torch.tensor(numbers, device=self.device)

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _take_out(self) -> list[Rollout]:
        cache, stats, schedule = self.cache, self.stats, self.schedule
        used = (len(cache.shares) - 1 - len(cache.free)) * self.page_bytes
        stats.peak_cache_bytes = max(stats.peak_cache_bytes, used)
        stats.preemptions, schedule.preemptions = stats.preemptions + schedule.preemptions, 0
        return [
            Rollout(
                prompt=draft.prompt,
                index=draft.index,
                sample=draft.sample,
                token_ids=tuple(draft.tokens),
                logprobs=tuple(draft.logprobs),
                finish_reason="stop" if draft.stopped else "length",
                policy_version=self.version,
                routed_experts=routes,
            )
            for draft, routes in self._retire()
        ]

    def _retire(self) -> list[tuple[Draft, Tensor | None]]:
        """The rows that have ended, with their experts where those are kept."""
        ended = [draft for draft in self.schedule.running if draft.ended]
        routes: list[Tensor | None] = [None] * len(ended)
        if self.record_routes:
            routes = [self.cache.routed_experts(draft.row).cpu() for draft in ended]
        self.schedule.retire()
        return list(zip(ended, routes, strict=True))
