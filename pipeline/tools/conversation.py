"""What `chat` and `serve` share: a model opened for conversation, messages in, thinking and answer out."""

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


@dataclass(frozen=True, slots=True)
class Piece:
    """A few tokens of a reply."""

    texts: list[tuple[Part, str]]
    """The text that is final with these tokens, in order."""
    token_ids: list[int]
    logprobs: list[float]
    """Of each token, under the distribution that it was sampled from."""
    finish_reason: str
    """Empty until the last piece."""


class Conversation:
    """A model and its tokenizer; one thread at a time uses them."""

    def __init__(self, config: ModelSettings) -> None:
        """Raises `UserError`: no such model, one without a tokenizer, or one that is served elsewhere."""
        if config.engine == "endpoint":
            raise UserError("engine endpoint has no token ids, which chat and serve need; see generate")
        self.engine, self.tokenizer = open_speaker(config)
        try:
            self.context, self.vocabulary = context_and_vocabulary(config.model, config.vllm.context)
        except ValueError as error:
            self.engine.close()
            raise UserError(str(error)) from error
        native = "r1" if self.tokenizer.chat_template else "raw"
        self.template = trained_template(config.model) or native

    def prompt(self, messages: Sequence[Message]) -> tuple[list[int], bool]:
        """Token ids of a conversation, and whether they end inside an open think tag. A model trained with a
        template for single questions gets the last message. Raises `ValueError`: it is refused."""
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

    def check(self, ids: Sequence[int]) -> None:
        """Raises `ValueError`: a prompt that is empty, of another vocabulary, or as long as the context."""
        if not ids:
            raise ValueError("the prompt has no tokens.")
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise ValueError(f"token id {wrong[0]} is outside the model's vocabulary of {self.vocabulary}.")
        if len(ids) >= self.context:
            raise ValueError(f"the prompt has {len(ids)} tokens; the model's context holds {self.context}.")

    def stream(
        self, ids: Sequence[int], opened: bool | None, sampling: SamplingParams, stops: Sequence[str] = ()
    ) -> Iterator[Piece]:
        """Generate piece by piece, each text as thinking or answer. `opened`: whether the prompt ends inside
        an open think tag; `None` = all is answer, tags included. Raises `ValueError`: as `check`."""
        self.check(ids)
        decoder, split = Decoder(self.tokenizer, stops), None if opened is None else ThinkingSplit(opened)
        for new, logprobs, over in pieces(self.engine, ids, sampling, self.context - len(ids)):
            text = decoder.add(new, over=bool(over))
            reason, kept = "stop" if decoder.stopped else over, len(new) - decoder.surplus
            answer: list[tuple[Part, str]] = [("answer", text)] if text else []
            texts = list(split.add(text, over=bool(reason))) if split else answer
            yield Piece(texts, new[:kept], logprobs[:kept], reason)
            if reason:
                return
