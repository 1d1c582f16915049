"""Completions piece by piece, as text: any engine, a few tokens at a time.

An engine returns complete rollouts. A few tokens at a time, each time with those before in the prompt, have
the same distribution (each piece has uniforms of its own); the cost is a short prefill a piece.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerFast

from rollout.engine import RolloutEngine
from rollout.text.tokenizer import decode
from rollout.types import Problem, Prompt, SamplingParams

PIECE = 8  # tokens of one request: fewer appear sooner, more cost less
Part = Literal["thinking", "answer"]
OPEN, CLOSE = "<think>", "</think>"
UNFINISHED = "\ufffd"  # the tokenizer's output for bytes that are not yet a character


def pieces(
    engine: RolloutEngine, token_ids: Sequence[int], sampling: SamplingParams, room: int
) -> Iterator[tuple[list[int], list[float], str]]:
    """New tokens of one sample, their log-probabilities, and "" or, at the end, the finish reason. `room` is
    the number of tokens that the context has left after the prompt `token_ids`. The first piece has the
    prompt index `sampling.first_index`, and each further piece the next one."""
    problem, so_far = Problem(id="stream", kind="general", question=""), list(token_ids)
    left, number = min(sampling.max_tokens, room), sampling.first_index
    while True:
        part = replace(sampling, n=1, max_tokens=min(PIECE, left), first_index=number)
        (rollout,) = engine.generate([Prompt(problem, "raw", tuple(so_far))], part)
        so_far, left, number = so_far + list(rollout.token_ids), left - len(rollout.token_ids), number + 1
        over = "stop" if rollout.finish_reason == "stop" else "length" if left <= 0 else ""
        yield list(rollout.token_ids), list(rollout.logprobs), over
        if over:
            return


class Decoder:
    """Tokens in, text out as soon as it is final: no half characters, and nothing after a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.emitted = 0
        self.stopped = False
        self.surplus = 0
        """Tokens of the last `add` after the one that completes a stop string."""

    def text(self, ids: Sequence[int]) -> str:
        """All text up to and including the tokens `ids`."""
        known = self.ids + [i for i in ids if i != self.tokenizer.eos_token_id]
        return decode(self.tokenizer, known)

    def add(self, ids: Sequence[int], over: bool = False) -> str:
        """The text that these tokens add; with `over` also what was held back."""
        text = self.text(ids)
        if any(stop in text for stop in self.stops):
            count = next(
                n for n in range(1, len(ids) + 1) if any(s in self.text(ids[:n]) for s in self.stops)
            )
            self.stopped, self.surplus, ids = True, len(ids) - count, ids[:count]
            text = self.text(ids)
            text = text[: min(at for stop in self.stops if (at := text.find(stop)) >= 0)]
        elif not over:
            text = text.rstrip(UNFINISHED)
            held = max((overlap(text, stop) for stop in self.stops), default=0)
            text = text[: len(text) - held]
        self.ids += [i for i in ids if i != self.tokenizer.eos_token_id]
        new, self.emitted = text[self.emitted :], max(self.emitted, len(text))
        return new


def overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that may be the beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class ThinkingSplit:
    """Splits text that arrives in pieces into thinking and answer; the think tags belong to neither."""

    def __init__(self, thinking: bool) -> None:
        """`thinking`: the prompt has opened the tag already."""
        self.part: Part = "thinking" if thinking else "answer"
        self.rest = ""
        self.changed = thinking

    def add(self, text: str, over: bool = False) -> Iterator[tuple[Part, str]]:
        """The text whose part is certain."""
        self.rest += text
        while True:
            tag = CLOSE if self.part == "thinking" else OPEN
            at = self.rest.find(tag)
            # A second thought is part of the answer's text.
            if at < 0 or (tag == OPEN and (self.changed or self.rest[:at].strip())):
                held = 0 if over else overlap(self.rest, tag)
                ready, self.rest = self.rest[: len(self.rest) - held], self.rest[len(self.rest) - held :]
                if ready:
                    yield self.part, ready
                return
            if at:
                yield self.part, self.rest[:at]
            self.rest = self.rest[at + len(tag) :]
            self.part, self.changed = ("answer" if self.part == "thinking" else "thinking"), True
