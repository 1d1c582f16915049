"""What `chat` and `serve` share: a model opened for conversation, messages in, thinking and answer out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.tools.open import ModelSettings, open_speaker, trained_template
from rollout.text.stream import Decoder, Part, ThinkingSplit, pieces
from rollout.types import SamplingParams

Message = dict[str, str]
"""`role` and `content`, as in the OpenAI API."""


@dataclass(slots=True)
class Said:
    """A completion in the making."""

    prompt_tokens: int
    tokens: int = 0
    finish_reason: str = ""


class Conversation:
    """A model and its tokenizer. One request is drawn from at a time, turn by turn with others."""

    def __init__(self, config: ModelSettings) -> None:
        """
        Raises:
            UserError: no such model, or one that cannot be talked to.
        """
        from rollout.checkpoint import context_and_vocabulary

        self.engine, self.tokenizer = open_speaker(config)
        self.lock = threading.Lock()
        try:
            self.context, _ = context_and_vocabulary(config.model, config.vllm.context)
        except ValueError as error:
            self.engine.close()
            raise UserError(str(error)) from error
        native = "r1" if self.tokenizer.chat_template else "raw"
        self.template = trained_template(config.model) or native

    def prompt(self, messages: Sequence[Message]) -> tuple[list[int], bool]:
        """Token ids of a conversation, and whether they end inside an open think tag.

        A model that was trained with a template for single questions sees the last message alone.
        """
        from rollout.text.templates import TEMPLATES, THINK
        from rollout.text.tokenizer import encode_prompt, prefill

        template = TEMPLATES.get(self.template, TEMPLATES["raw"])
        if not template.chat or not self.tokenizer.chat_template:
            name = template.name if not template.chat else "raw"
            return encode_prompt(self.tokenizer, messages[-1]["content"], name), False
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        opened = prefill(self.tokenizer, template.name) == THINK
        if opened and not text.endswith(THINK):
            # A tokenizer that leaves the opening to others, and a model that was trained with it.
            text += THINK if known_to_think(self.tokenizer) else ""
        opened = text.endswith(THINK)
        return self.tokenizer.encode(text, add_special_tokens=False), opened

    def speak(
        self,
        ids: Sequence[int],
        opened: bool,
        sampling: SamplingParams,
        said: Said,
        stops: Sequence[str] = (),
    ) -> Iterator[tuple[Part, str]]:
        """Draw and yield text as it comes, as thinking or answer; `said` keeps count.

        Raises:
            ValueError: a prompt that the context has no room for.
        """
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens; the model's context holds {self.context}.")
        decoder, split = Decoder(self.tokenizer, stops), ThinkingSplit(opened)
        stream = pieces(self.engine, ids, sampling, room)
        while not said.finish_reason:
            with self.lock:
                new, over = next(stream)
            said.tokens += len(new)
            text = decoder.add(new, over=bool(over))
            said.finish_reason = "stop" if decoder.stopped else over
            yield from split.add(text, over=bool(said.finish_reason))


def known_to_think(tokenizer: object) -> bool:
    """Whether `</think>` is a token of its own: models that never saw it would not close what we open."""
    vocabulary = tokenizer.get_vocab()  # type: ignore[attr-defined]
    return "</think>" in vocabulary
