"""What `chat` and `serve` share: a model opened for conversation, messages in, thinking and answer out."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.settings.tools import ModelSettings
from pipeline.tools.open import open_speaker, trained_template
from rollout.checkpoint import context_and_vocabulary
from rollout.text.stream import Decoder, Part, ThinkingSplit, pieces
from rollout.text.templates import TEMPLATES, THINK
from rollout.text.tokenizer import as_data, chat_text, encode_prompt, encode_text, opening, prefill
from rollout.types import SamplingParams

Message = dict[str, str]
"""`role` and `content`, as in the OpenAI API."""


@dataclass(slots=True)
class Reply:
    """Counts of a reply while it is generated; `finish_reason` is empty until it ends."""

    prompt_tokens: int
    tokens: int = 0
    finish_reason: str = ""


class Conversation:
    """A model and its tokenizer. Concurrent requests alternate, a few tokens each."""

    def __init__(self, config: ModelSettings) -> None:
        """
        Raises:
            UserError: no such model, or one without a tokenizer.
        """
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

        A model trained with a template for single questions gets the last message alone.
        """
        template = TEMPLATES.get(self.template, TEMPLATES["raw"])
        if not template.chat or not self.tokenizer.chat_template:
            name = template.name if not template.chat else "raw"
            return encode_prompt(self.tokenizer, messages[-1]["content"], name), False
        safe = [message | {"content": as_data(self.tokenizer, message["content"])} for message in messages]
        text = chat_text(self.tokenizer, safe)
        if prefill(self.tokenizer, template.name) and not opening(text):
            # The chat template leaves the opening out, but the model was trained with it.
            # One without a token for the end would never close the block.
            text += THINK if "</think>" in self.tokenizer.get_vocab() else ""
        return encode_text(self.tokenizer, text), bool(opening(text))

    def stream(
        self,
        ids: Sequence[int],
        opened: bool,
        sampling: SamplingParams,
        reply: Reply,
        stops: Sequence[str] = (),
    ) -> Iterator[tuple[Part, str]]:
        """Generate, and yield each piece of text as thinking or answer; `reply` keeps count.

        Raises:
            ValueError: the prompt fills the context.
        """
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens; the model's context holds {self.context}.")
        decoder, split = Decoder(self.tokenizer, stops), ThinkingSplit(opened)
        new_pieces = pieces(self.engine, ids, sampling, room)
        while not reply.finish_reason:
            with self.lock:
                new, over = next(new_pieces)
            reply.tokens += len(new)
            text = decoder.add(new, over=bool(over))
            reply.finish_reason = "stop" if decoder.stopped else over
            yield from split.add(text, over=bool(reply.finish_reason))
