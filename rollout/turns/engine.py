"""Rollouts of several turns: the model writes, an environment answers, the model goes on.

A turn is one completion of any engine, and the next turn's prompt is all tokens so far, prefilled again: none
is tokenized twice. The environment sees texts alone. A turn that a stop string ended is continued in place,
one that an end token ended by the template's next message. The turns of a request wait for each other; the
index that seeds a later turn is its place among those that go on.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from rollout.engine import RolloutEngine, WrappingEngine
from rollout.text.tokenizer import as_data, decode, encode_text, next_turn, prefill
from rollout.types import Problem, Prompt, Rollout, SamplingParams

TURN_SEED = 0xC2B2AE3D
"""Between the seeds of turns, so that they use other random numbers."""
CHARACTERS = 64
"""Of an observation a token that there is room for; a longer one does not fit, and is not tokenized."""

Message = dict[str, str]
Answer = str | float | None
"""An observation; or the rollout is done, with the environment's own score or without."""
Step = Callable[[list[Message]], Answer]
"""From `{"role": "user" | "assistant", "content": ..}`, the model's latest turn last, to the answer. The
observation "" lets the model go on where a stop string ended the turn; after an end token it is the end."""


@dataclass(frozen=True, slots=True)
class Environment:
    """`start` is called once a rollout, its step once a turn, in threads; strings of `stop` end turns."""

    start: Callable[[Problem], Step]
    stop: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Episode:
    """A rollout in the making: all its turns so far."""

    rollout: Rollout
    messages: list[Message]
    step: Step | None = None
    ended: bool = False  # the latest turn, by an end token

    def add(self, ids: Sequence[int], logprobs: Sequence[float], **changes: Any) -> None:
        """Add tokens to the completion."""
        both = [*self.rollout.token_ids, *ids], [*self.rollout.logprobs, *logprobs]
        self.rollout = replace(self.rollout, token_ids=both[0], logprobs=both[1], **changes)

    def add_turn(self, turn: Rollout, most: int) -> None:
        """Add a turn, cut at `most` tokens of the completion; routes of earlier tokens stay as they were."""
        ids, known = turn.token_ids[: most - len(self.rollout.token_ids)], self.rollout.routed_experts
        routes, end = turn.routed_experts, len(turn.prompt.token_ids) + len(ids) - 1
        if routes is not None and known is not None:
            routes = torch.cat([known, routes[len(known) : end]])
        reason = turn.finish_reason if len(ids) == len(turn.token_ids) else "length"
        self.add(ids, turn.logprobs[: len(ids)], finish_reason=reason, routed_experts=routes)


class TurnEngine(WrappingEngine):
    """An engine whose rollouts have several turns; observations count for `max_tokens`."""

    def __init__(
        self,
        engine: RolloutEngine,
        environment: Environment,
        tokenizer: PreTrainedTokenizerFast,
        eos: frozenset[int],
        max_turns: int,
        timeout_s: float = 60.0,
    ) -> None:
        """`eos`: ids that end a turn. After `max_turns` a rollout that is not done is cut. Where none is
        answered for `timeout_s` seconds, the environment has failed for all that wait."""
        self.engine, self.in_place, self.environment = engine, engine.in_place, environment
        self.tokenizer, self.eos, self.max_turns, self.timeout_s = tokenizer, eos, max_turns, timeout_s

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """As the engine. An observation that leaves no room for another token is left out: it cuts."""
        sampling = replace(sampling, stop=(*sampling.stop, *self.environment.stop))
        return self._turns(self.engine.generate(prompts, sampling), sampling)

    def _turns(self, rollouts: Iterator[Rollout], sampling: SamplingParams) -> Iterator[Rollout]:
        going, most = list[Episode](), sampling.max_tokens
        for turn in itertools.count(1):
            asked = dict[Future[Answer], Episode]()
            for made in rollouts:
                if turn > 1:
                    (episode := going[made.index]).add_turn(made, most)
                else:
                    question = {"role": "user", "content": made.prompt.problem.question}
                    episode = Episode(made, [question])
                if episode.rollout.finish_reason == "stop":
                    asked[self._ask(episode, made)] = episode
                else:
                    yield episode.rollout
            going = []
            for future in self._answered(asked):
                if self._goes_on(asked[future], future, turn, most):
                    going.append(asked[future])
                else:
                    yield asked[future].rollout
            if not going:
                return
            going.sort(key=lambda e: (e.rollout.index, e.rollout.sample))
            seed, first = sampling.seed + turn * TURN_SEED, sampling.first_index * sampling.n
            left = most - min(len(e.rollout.token_ids) for e in going)
            later = replace(sampling, n=1, max_tokens=left, min_tokens=0, seed=seed, first_index=first)
            sofar = [(r.prompt, (*r.prompt.token_ids, *r.token_ids)) for r in (e.rollout for e in going)]
            rollouts = self.engine.generate([replace(p, token_ids=ids) for p, ids in sofar], later)

    def _ask(self, episode: Episode, turn: Rollout) -> Future[Answer]:
        """The answer to a turn, from a thread that ends with this process."""
        problem, future = turn.prompt.problem, Future[Answer]()
        episode.ended = turn.token_ids[-1] in self.eos
        said = decode(self.tokenizer, turn.token_ids[: -1 if episode.ended else None])
        opened = "" if episode.step else prefill(self.tokenizer, turn.prompt.template)
        episode.messages.append({"role": "assistant", "content": opened + said})

        def run() -> None:
            with suppress(InvalidStateError):  # it was given up
                try:
                    episode.step = episode.step or self.environment.start(problem)
                    future.set_result(episode.step([*episode.messages]))
                except Exception as error:
                    future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _answered(self, asked: Iterable[Future[Answer]]) -> Iterator[Future[Answer]]:
        """Each as it is answered; cancelled, where the environment hangs."""
        pending = set(asked)
        while pending:
            done, pending = wait(pending, self.timeout_s, FIRST_COMPLETED)
            if not done:
                done, pending = pending, set()
                for future in done:
                    future.cancel()
            yield from done

    def _goes_on(self, episode: Episode, future: Future[Answer], turn: int, most: int) -> bool:
        """Take an answer; whether another turn follows it."""
        made, changes, n = episode.rollout, dict[str, Any](), len(episode.rollout.token_ids)
        try:
            answer = future.result()
            if isinstance(answer, str) and (answer or not episode.ended):
                fits = turn < self.max_turns and len(answer) <= CHARACTERS * (most - n)
                if fits and n + len(ids := self._encoded(episode, answer)) < most:
                    spans = (*made.observed, (n, n + len(ids))) if ids else made.observed
                    episode.add(ids, [0.0] * len(ids), observed=spans)
                    episode.messages.append({"role": "user", "content": answer})
                    return True
                changes["finish_reason"] = "length"
            elif answer is not None and not isinstance(answer, str):
                changes["score"] = float(answer)
                if not math.isfinite(answer):
                    raise ValueError(f"the score {answer} is no finite number")
        except Exception as error:  # of the environment's own code, whatever it is
            hung = f"no answer within {self.timeout_s:g} s"
            why = hung if future.cancelled() else f"{type(error).__name__}: {error}".partition("\n")[0]
            changes["failure"] = f"the environment failed: {why}"[:300]
        episode.rollout = replace(made, **changes)
        return False

    def _encoded(self, episode: Episode, text: str) -> list[int]:
        """An observation's tokens, as data; where a message ended before it, with the markup of the next."""
        text, made = as_data(self.tokenizer, text), episode.rollout
        if episode.ended:
            mark = str(self.tokenizer.decode([made.token_ids[-1]]))
            text = next_turn(self.tokenizer, text, made.prompt.template, mark)
        return encode_text(self.tokenizer, text)
