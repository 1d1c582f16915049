"""In-process engine for the native model: RL's hot loop.

It generates from the trainer's own weights in place: an update costs nothing, and the engine is never stale.
Rows of any age decode together (continuous batching, `rollout.native.schedule`) over pages of latents
(`model.cache`).

Speculation: the model's MTP module guesses the token after the next, and the trunk reads both at once. Each
token is sampled from the trunk's distribution with the uniform that belongs to its position, guess or no
guess, and a guess is kept if it equals that token. So speculation changes the cost and not one token, where
rejection sampling (arXiv:2302.01318) would keep the distribution only.

Axes    b rows of a step, s new tokens of each (2 with a guess, else 1), d width, v vocabulary
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.cache import LatentCache, bytes_per_page
from model.transformer import Transformer
from rollout.engine import Unanswerable
from rollout.native.graphs import DecodeGraphs, capturable
from rollout.native.schedule import Draft, Schedule, Stats, pages_of
from rollout.sampling import refuse_nonfinite, sample
from rollout.stopping import Stopper, check_prompts, most_tokens
from rollout.types import Eos, Prompt, Rollout, SamplingParams
from rollout.weights import InPlaceEngine


class NativeEngine(InPlaceEngine):
    """`RolloutEngine` for the native `Transformer`."""

    policy: Transformer

    def __init__(
        self,
        policy: Transformer,
        *,
        max_batch: int = 512,
        cache_bytes: int = 4 << 30,
        prefill_tokens: int = 4096,
        speculate: bool = False,
        record_routes: bool = False,
        cuda_graphs: bool = True,
        eos_token_id: Eos = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        """
        Args:
            max_batch: rows that decode together, at most.
            cache_bytes: largest memory for latents. Rows that do not fit wait.
            prefill_tokens: prompt tokens of one prefill, unless a single prompt is longer.
            speculate: guess one token ahead with the first MTP module.
            record_routes: record every token's experts, for replay in training.
            cuda_graphs: launch a decode step's kernels as one graph where `capturable` allows: bf16 on Hopper
                and Blackwell. Cache and graphs are then kept from request to request.
            eos_token_id: ends a completion; `None` = the model config's.
            tokenizer: reads stop strings; not needed without them.

        Raises:
            ValueError: speculation with a model that has no MTP module.
        """
        if speculate and not len(policy.mtp):
            raise ValueError(
                "speculate needs a model with an MTP module (num_nextn_predict_layers >= 1), and this one "
                "has none; switch speculation off."
            )
        self.policy, self.tokenizer = policy, tokenizer
        self.max_batch, self.cache_bytes, self.prefill_tokens = max_batch, cache_bytes, prefill_tokens
        self.speculate, self.record_routes = speculate, record_routes
        self.eos_token_id = policy.config.eos_token_id if eos_token_id is None else eos_token_id
        self.stats = Stats()
        self.graphs: DecodeGraphs | None = None
        self.cuda_graphs = cuda_graphs

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield each rollout when it ends.

        Raises:
            Unanswerable: at once, when a prompt is empty, too long, or of another vocabulary, when the cache
                cannot hold the longest rollout, or when stop strings meet a model without tokenizer.
            FloatingPointError: when the model's logits are not finite.
        """
        prompts, most = list(prompts), self.policy.config.max_position_embeddings
        check_prompts(prompts, most, self.policy.config.vocab_size)
        stopper = Stopper(sampling, self.eos_token_id, self.tokenizer)
        if not prompts:
            return iter(())
        lengths = [len(p.token_ids) + most_tokens(p, sampling, most) for p in prompts]
        size = self.page_bytes()
        room, needed = self.cache_bytes // size, [pages_of(n) for n in lengths]
        if max(needed) > room:
            worst = needed.index(max(needed))
            raise Unanswerable(
                f"prompt {worst} with {sampling.max_tokens} new tokens needs {needed[worst] * size:,} bytes "
                f"of cache, and cache_gib allows {self.cache_bytes:,}; raise it, or lower max_tokens."
            )
        rows = min(self.max_batch, len(prompts) * sampling.n)
        pages = min(room, (rows + 1) * max(needed))

        def generated() -> Iterator[Rollout]:
            # One request, one version, but for `renew`: other weights count from the next request on.
            run = _Run(self, self.open_cache(rows + 1, max(lengths), pages), rows, prompts, sampling, stopper)
            while run.schedule.busy():
                if self.renew():
                    run.version = self.version
                    run.schedule.restart()
                # Not inference_mode: a table that a model fills on first use must serve training too.
                with torch.no_grad():
                    ended = run.advance()
                yield from ended

        return generated()

    def page_bytes(self) -> int:
        """Memory of a page of the cache, as this engine fills it."""
        size = self.policy.norm.weight.element_size()
        return bytes_per_page(self.policy.config, size, self.speculate, self.record_routes)

    def drain(self) -> dict[str, float]:
        """Share of right guesses, and preempted rows, since the last call; empty where there were none."""
        stats, self.stats = self.stats, Stats()
        out = {"rollout/mtp_acceptance": stats.acceptance()} if stats.guesses else {}
        return out | ({"rollout/preemptions": float(stats.preemptions)} if stats.preemptions else {})

    def close(self) -> None:
        """Free the graphs and their cache."""
        self.graphs = None

    def open_cache(self, rows: int, max_tokens: int, pages: int) -> LatentCache:
        """An empty cache; on a GPU with graphs the last request's, where it fits."""
        if self.graphs is not None and self.graphs.net is self.policy:
            kept = self.graphs.cache
            if (len(kept.lengths), kept.max_tokens, len(kept.shares)) == (rows, max_tokens, pages + 1):
                kept.clear()
                return kept
        cache = self.policy.new_cache(
            rows, max_tokens, pages=pages, record_routes=self.record_routes, drafts=self.speculate
        )
        graphs = self.cuda_graphs and capturable(self.policy)
        self.graphs = DecodeGraphs(self.policy, cache) if graphs else None
        return cache


class _Run:
    """One request from its prompts to its last rollout."""

    def __init__(
        self,
        engine: NativeEngine,
        cache: LatentCache,
        rows: int,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        stopper: Stopper,
    ) -> None:
        self.net, self.version, self.stats = engine.policy, engine.version, engine.stats
        self.speculate, self.record_routes = engine.speculate, engine.record_routes
        self.cache, self.graphs, self.page_bytes = cache, engine.graphs, engine.page_bytes()
        self.sampling, self.stopper, self.device = sampling, stopper, self.net.norm.weight.device
        most, together = self.net.config.max_position_embeddings, engine.prefill_tokens
        self.schedule = Schedule(
            cache, prompts, sampling, most, rows, together, self.stats, own=int(self.speculate)
        )

    def advance(self) -> list[Rollout]:
        """Begin rows that fit, sample one or two tokens for every row, and take out those that have ended."""
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
            self._sample(self.net.head(states), drafts)
            self._guess_first(states, drafts)
            schedule.run(drafts)

    def _read(self, prompts: Sequence[Sequence[int]], rows: list[int]) -> Tensor:
        self.stats.prefilled += sum(map(len, prompts))
        return self.net.prefill(prompts, self.cache, np.array(rows, dtype=np.int64))

    def _step(self) -> None:
        schedule, cache = self.schedule, self.cache
        # A guess needs a slot of its own; a row with one slot left has none.
        fits = self.speculate and int(cache.lengths[schedule.live()].max()) + 2 <= cache.max_tokens
        width = 2 if fits else 1
        schedule.make_room(width)
        drafts, live = schedule.running, schedule.live()
        step = cache.append(live, width)
        tokens = self._tensor([[draft.tokens[-1], draft.guess][:width] for draft in drafts])  # b s
        # b s d
        states = self.graphs.decode(tokens, step) if self.graphs else self.net.decode(tokens, cache, step)
        logits = self.net.head(states)  # b s v
        self._sample(logits[:, 0], drafts)
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
                self._sample(logits[right, 1], [drafts[i] for i in right])
            cache.lengths[live] -= 1 - kept
        # The token after each slot; after a wrong guess there is none, and its slot is overwritten.
        following = [[*draft.tokens[-1 - n :], 0][:width] for draft, n in zip(drafts, kept, strict=True)]
        guessed = self.net.draft(states, self._tensor(following), cache, step)
        self._guess(guessed[torch.arange(len(drafts)), torch.from_numpy(kept)], drafts)

    def _guess_first(self, states: Tensor, drafts: list[Draft]) -> None:
        """Guess after a prefill with last `states` (b d), whose next token the module needs."""
        if self.speculate:
            rows = np.array([draft.row for draft in drafts], dtype=np.int64)
            step = self.cache.step(rows, self.cache.lengths[rows] - 1, 1)
            following = self._tensor([[draft.tokens[-1]] for draft in drafts])
            self._guess(self.net.draft(states[:, None], following, self.cache, step)[:, 0], drafts)

    def _guess(self, states: Tensor, drafts: list[Draft]) -> None:
        """The guess for each row's next token by `states` (b d) of the MTP module, sampled with the uniform
        that token will use."""
        logits = self.net.head(states)
        self._refuse_nonfinite(logits, drafts)
        guesses, _ = sample(logits, self._uniforms(drafts), self.sampling)
        for draft, guess in zip(drafts, guesses.tolist(), strict=True):
            draft.guess = guess

    def _sample(self, logits: Tensor, drafts: list[Draft]) -> None:
        """Append the next token of every row, from `logits` (b v)."""
        self._refuse_nonfinite(logits, drafts)
        if self.stopper.min_tokens:
            early = [i for i, draft in enumerate(drafts) if len(draft.tokens) < self.stopper.min_tokens]
            logits = self.stopper.ban(logits, self._tensor(early))
        tokens, logprobs = sample(logits, self._uniforms(drafts), self.sampling)
        for draft, token, logprob in zip(drafts, tokens.tolist(), logprobs.tolist(), strict=True):
            draft.append(token, logprob, self.stopper, self.version)
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
        """The rollouts that have ended; their rows are free."""
        cache, stats = self.cache, self.stats
        used = (len(cache.shares) - 1 - len(cache.free)) * self.page_bytes
        stats.peak_cache_bytes = max(stats.peak_cache_bytes, used)
        ended = [draft for draft in self.schedule.running if draft.ended]
        routes = [cache.routed_experts(draft.row).cpu() if self.record_routes else None for draft in ended]
        self.schedule.retire(ended)
        return [draft.rollout(seen) for draft, seen in zip(ended, routes, strict=True)]
