"""Rollouts of several turns: the model writes, an environment answers, the model goes on.

A turn is one completion of any engine, and the next turn's prompt is all tokens so far, prefilled again: none
is tokenized twice. The environment sees texts alone. A turn that a stop string ended is continued in place,
one that an end token ended by the template's next message. The turns of a request wait for each other; the
index that seeds a later turn is its place among those that go on.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
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
    """A rollout in the making: all its turns so far, and the answer to the latest."""

    rollout: Rollout
    messages: list[Message]
    step: Step | None = None
    ended: bool = False  # the latest turn, by an end token
    answer: Future[Answer] | None = None


def longer(old: Rollout, ids: Sequence[int], logprobs: Sequence[float], **changes: Any) -> Rollout:
    """A rollout with further tokens."""
    both = [*old.token_ids, *ids], [*old.logprobs, *logprobs]
    return replace(old, token_ids=both[0], logprobs=both[1], **changes)


def with_turn(old: Rollout, turn: Rollout, most: int) -> Rollout:
    """A rollout with a further turn, cut at `most` tokens; routes of earlier tokens stay as they were."""
    ids, routes, known = turn.token_ids[: most - len(old.token_ids)], turn.routed_experts, old.routed_experts
    if routes is not None and known is not None:
        routes = torch.cat([known, routes[len(known) : len(turn.prompt.token_ids) + len(ids) - 1]])
    reason = turn.finish_reason if len(ids) == len(turn.token_ids) else "length"
    changes = {"finish_reason": reason, "routed_experts": routes, "last_version": turn.last_version}
    return longer(old, ids, turn.logprobs[: len(ids)], **changes)


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
        context: int = sys.maxsize,
    ) -> None:
        """`eos`: ids that end a turn. After `max_turns` a rollout that is not done is cut, as is one that
        an observation would take out of the `context`, prompt included. The environment has failed for a
        rollout that is not answered `timeout_s` seconds after the one before it was."""
        self.engine, self.environment = engine, environment
        self.in_place, self.in_flight = engine.in_place, engine.in_flight
        self.tokenizer, self.eos, self.max_turns, self.timeout_s = tokenizer, eos, max_turns, timeout_s
        self.context = context

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """As the engine. An observation that leaves no room for another token is left out: it cuts."""
        sampling = replace(sampling, stop=(*sampling.stop, *self.environment.stop))
        return self._turns(self.engine.generate(prompts, sampling), sampling)

    def _turns(self, rollouts: Iterator[Rollout], sampling: SamplingParams) -> Iterator[Rollout]:
        going, most = list[Episode](), sampling.max_tokens
        for turn in count(1):
            asked = list[Episode]()
            for made in rollouts:
                question = {"role": "user", "content": made.prompt.problem.question}
                episode = going[made.index] if turn > 1 else Episode(made, [question])
                episode.rollout = with_turn(episode.rollout, made, most) if turn > 1 else made
                if episode.rollout.finish_reason == "stop":
                    self._ask(episode, made.token_ids)
                    asked.append(episode)
                else:
                    yield episode.rollout
            patience, going = self.timeout_s, []
            for episode in asked:
                if self._goes_on(episode, patience, turn, most):
                    going.append(episode)
                else:
                    yield episode.rollout
                patience = patience if episode.answer and episode.answer.done() else 0.0
            if not going:
                return
            going.sort(key=lambda e: (e.rollout.index, e.rollout.sample))
            seed, first = sampling.seed + turn * TURN_SEED, sampling.first_index * sampling.n
            left = most - min(len(e.rollout.token_ids) for e in going)
            later = replace(sampling, n=1, max_tokens=left, min_tokens=0, seed=seed, first_index=first)
            sofar = [(r.prompt, (*r.prompt.token_ids, *r.token_ids)) for r in (e.rollout for e in going)]
            rollouts = self.engine.generate([replace(p, token_ids=ids) for p, ids in sofar], later)

    def _ask(self, episode: Episode, ids: Sequence[int]) -> None:
        """Have a turn of tokens `ids` answered, in a thread that ends with this process."""
        prompt, future = episode.rollout.prompt, Future[Answer]()
        episode.ended, episode.answer = ids[-1] in self.eos, future
        opened = "" if episode.step else prefill(self.tokenizer, prompt.template)
        said = opened + decode(self.tokenizer, ids[: -1 if episode.ended else None])
        episode.messages.append({"role": "assistant", "content": said})

        def run() -> None:
            try:
                episode.step = episode.step or self.environment.start(prompt.problem)
                future.set_result(episode.step([*episode.messages]))
            except Exception as error:
                future.set_exception(error)
            except SystemExit:
                future.set_exception(RuntimeError("it called exit()"))

        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:  # the machine has no more threads
            future.set_exception(error)

    def _goes_on(self, episode: Episode, patience: float, turn: int, most: int) -> bool:
        """Take the answer to a turn; whether another turn follows."""
        made, changes, n = episode.rollout, dict[str, Any](), len(episode.rollout.token_ids)
        future, most = episode.answer, min(most, self.context - len(made.prompt.token_ids))
        assert future is not None
        try:
            answer = future.result(patience)
            if isinstance(answer, str) and (answer or not episode.ended):
                fits = turn < self.max_turns and len(answer) <= CHARACTERS * (most - n)
                if fits and n + len(ids := self._encoded(episode, answer)) < most:
                    spans = (*made.observed, (n, n + len(ids))) if ids else made.observed
                    episode.rollout = longer(made, ids, [0.0] * len(ids), observed=spans)
                    episode.messages.append({"role": "user", "content": answer})
                    return True
                changes["finish_reason"] = "length"
            elif answer is not None and not isinstance(answer, str):
                changes["score"] = float(answer)
                if not math.isfinite(answer):
                    raise ValueError(f"the score {answer} is no finite number")
        except Exception as error:  # of the environment's own code, whatever it is
            raised = f"{type(error).__name__}: {error}".partition("\n")[0]
            why = raised if future.done() else f"no answer within {self.timeout_s:g} s"
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
