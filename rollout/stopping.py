"""When a completion ends, and which prompts are refused: the same for all engines.

A completion ends with, and includes, its first stop token, or the token that completes a stop string;
neither before `min_tokens`, up to which stop tokens have probability 0. Otherwise it ends at `max_tokens` or
at the model's last position.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rollout.engine import Unanswerable
from rollout.types import Eos, FinishReason, Prompt, Rollout, SamplingParams

BYTES_OF_A_CHARACTER = 4
"""UTF-8's longest: a stop string of c characters has at most 4 c tokens."""


def check_prompts(prompts: Sequence[Prompt], max_positions: int, vocab_size: int) -> None:
    """Refuse prompts that no completion can follow, before anything is generated. Raises `Unanswerable`:
    naming the first prompt that is empty, too long, or has an id outside the vocabulary."""
    for index, prompt in enumerate(prompts):
        ids = prompt.token_ids
        if not ids:
            raise Unanswerable(f"prompt {index} has no tokens; a completion needs one to start from.")
        if len(ids) > max_positions - 1:
            raise Unanswerable(
                f"prompt {index} has {len(ids)} tokens; the model's {max_positions} positions "
                f"(max_position_embeddings) leave room for at most {max_positions - 1}."
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise Unanswerable(
                f"prompt {index} has token id {min(ids) if min(ids) < 0 else max(ids)}, outside the model's "
                f"vocabulary of {vocab_size}; is it tokenized for another model?"
            )


def stop_ids(eos: Eos, sampling: SamplingParams) -> list[int]:
    """The ids that end a completion: the request's, and the model's eos unless the request ignores it.

    With `ignore_eos` nothing stops before `max_tokens`, whatever else the request has."""
    if sampling.ignore_eos:
        return []
    own = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return sorted({*sampling.stop_token_ids, *own})


class Stopper:
    """Whether the last token of a completion ends it."""

    def __init__(self, sampling: SamplingParams, eos: Eos, tokenizer: PreTrainedTokenizerFast | None) -> None:
        """Raises `Unanswerable`: stop strings, and no tokenizer to read them with."""
        self.ids = stop_ids(eos, sampling)
        self.min_tokens = sampling.min_tokens
        self.strings = () if sampling.ignore_eos else sampling.stop
        if self.strings and tokenizer is None:
            raise Unanswerable(
                f"stop strings {list(self.strings)} need the model's tokenizer, and it has none; give "
                "stop_token_ids instead."
            )
        self.tokenizer = tokenizer
        longest = max(map(len, self.strings), default=0)
        self.window = BYTES_OF_A_CHARACTER * longest + BYTES_OF_A_CHARACTER

    def ban(self, logits: Tensor, rows: Tensor) -> Tensor:
        """`logits` (b v) with stop tokens at -inf in `rows` (n), those short of `min_tokens`."""
        if not len(rows) or not self.ids:
            return logits
        ids = torch.tensor(self.ids, device=logits.device)
        return logits.index_put((rows[:, None], ids), logits.new_tensor(-torch.inf))

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last of `tokens` ends the completion; `max_tokens` is the caller's check."""
        if len(tokens) < self.min_tokens:
            return False
        if tokens[-1] in self.ids:
            return True
        if not self.strings:
            return False
        text = self._text(tokens[-self.window :])
        found = [string for string in self.strings if string in text]
        if not found:
            return False
        # A string that was complete before min_tokens does not count, and may still be in the window.
        before = self._text(tokens[-self.window : -1])
        return any(text.count(string) > before.count(string) for string in found)

    def _text(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


@dataclass(slots=True, eq=False)
class Completion:
    """An unfinished rollout."""

    prompt: Prompt
    index: int  # of the prompt in the request
    sample: int
    limit: int  # largest number of its tokens
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    logprobs: "array[float]" = field(default_factory=lambda: array("f"))
    ended: bool = False
    stopped: bool = False  # ended by a stop token or string, not by its limit
    first_version: int = -1  # of the weights that its first and its last token were sampled with
    last_version: int = -1

    def append(self, token: int, logprob: float, stopper: Stopper, version: int) -> None:
        """Add a token that weights of `version` gave, and decide whether it is the last."""
        self.first_version, self.last_version = version if not self.tokens else self.first_version, version
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.stopped = stopper.ends(self.tokens)
        self.ended = self.stopped or len(self.tokens) == self.limit

    def rollout(self, routed_experts: Any = None) -> Rollout:
        """The record of a completion that has ended."""
        reason: FinishReason = "stop" if self.stopped else "length"
        made = (self.prompt, self.index, self.sample, self.tokens, self.logprobs, reason)
        return Rollout(*made, self.first_version, routed_experts, last_version=self.last_version)


def most_tokens(prompt: Prompt, sampling: SamplingParams, max_positions: int) -> int:
    """The longest completion that the request and the model's positions allow."""
    return min(sampling.max_tokens, max_positions - len(prompt.token_ids))
