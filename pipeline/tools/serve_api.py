"""OpenAI's API without the network: bodies into prompts and sampling, pieces of text into chunks and answers.

A parameter that would change the answer is served or refused by name. Thinking is separate, in
`reasoning_content`. Log-probabilities are those of the sampled tokens alone, under the distribution that
they were sampled from: temperature and truncation included.
"""

import itertools
import reprlib
import secrets
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, Field, ValidationError, WrapValidator, model_validator
from transformers import PreTrainedTokenizerFast as Tokenizer

from pipeline.settings.tools import ServeSettings
from pipeline.tools.conversation import Conversation, Piece
from rollout.text.stream import UNFINISHED
from rollout.text.tokenizer import encode_raw

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "functions": ([],),
    "function_call": ("none", "auto"), "logit_bias": ({},), "modalities": (["text"],), "suffix": ("",),
    "presence_penalty": (0,), "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"),
    "tool_calls": ([],), "tools": ([],),
}  # fmt: skip
"""Values with which a parameter that is not served changes nothing. Null is one for every parameter."""
WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls", "reasoning_content",
}  # fmt: skip
"""On the answer. R1's chat template leaves the thinking of past answers out."""
MOST_CHOICES = 2048
"""Prompts times `n`: each choice has 2**20 of the 2**32 prompt indices of the request's seed."""


class Refused(Exception):
    """A request that gets this status and an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def must_be(text: str) -> WrapValidator:
    """One error for a type, whatever it is a union of."""

    def check(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(f"must be {text}") from None

    return WrapValidator(check)


Text = Annotated[str, Field(min_length=1)]
Several = Field(min_length=1, fail_fast=True)
Ids = Annotated[list[int], Several]
NoAlternatives = Annotated[Literal[0], must_be("0: each sampled token's own, alternatives are not recorded")]


class Part(BaseModel):
    """A body or a part of one: nothing converted, nothing unknown, nothing infinite."""

    model_config = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, data: Any) -> Any:
        """Leave out what changes nothing; another name that is unknown is then an error."""
        if not isinstance(data, dict):
            return data
        served, spare = cls.model_fields.keys(), lambda k, v: k in WITHOUT_EFFECT or v in NEUTRAL.get(k, ())
        return {k: v for k, v in data.items() if v is not None and (k in served or not spare(k, v))}


class TextPart(Part):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Part):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], must_be("a string or a list of {type: 'text', text: ..}")]


class Body(Part):
    """What both endpoints have; `None` = the server's setting."""

    model: str = ""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Text | list[Text], must_be("a string or a list of strings, none empty")] | None = None
    stream: bool = False
    stream_options: Annotated[
        dict[Literal["include_usage", "include_obfuscation"], bool], must_be("{include_usage: true or false}")
    ] = {}


class TextBody(Body):
    """Of /v1/completions."""

    prompt: Annotated[
        Text | Annotated[list[Text], Several] | Ids | Annotated[list[Ids], Several],
        must_be("a string, a list of strings, a list of token ids or a list of such lists, none empty"),
    ]
    logprobs: NoAlternatives | None = None

    def prompts(self, talk: Conversation) -> list[tuple[list[int], bool | None]]:
        """Token ids, and that the text is not split."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        forms: Any = [self.prompt] if one else self.prompt
        return [(encode_raw(talk.tokenizer, f) if isinstance(f, str) else f, None) for f in forms]


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: NoAlternatives = 0

    def prompts(self, talk: Conversation) -> list[tuple[list[int], bool | None]]:
        """Token ids, and whether they end inside an open think tag."""
        contents = [message.content for message in self.messages]
        texts = [text if isinstance(text, str) else [part.text for part in text] for text in contents]
        roles = [m.role.replace("developer", "system") for m in self.messages]
        return [talk.prompt([{"role": r, "content": "".join(t)} for r, t in zip(roles, texts, strict=True)])]


Kind = TypeVar("Kind", bound=Body)


def parse_body(kind: type[Kind], data: bytes) -> Kind:
    """A request's body.
    Raises `Refused`: no JSON, or a parameter that is wrong or not served, by its name."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        says = str(first.get("ctx", {}).get("error", first["msg"][:1].lower() + first["msg"][1:]))
        ours = {"extra_forbidden": "not supported here", "json_invalid": f"not JSON: {says}"}
        says = ours.get(first["type"], says)
        param = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])[1:] or None
        if param:
            found = "" if first["type"] == "missing" else f"={reprlib.repr(first['input'])}"
            says = f"{param}{found}: {says}"
        raise Refused(400, says, param) from None


def respond(talk: Conversation, config: ServeSettings, name: str, body: TextBody | ChatBody) -> Iterator[Any]:
    """The chunks of the answer, choice after choice; the last has the usage and no choice. Raises `Refused`:
    before the first chunk, for a prompt that the model cannot go on from, or too many choices."""
    chat, tokens = isinstance(body, ChatBody), 0
    try:
        prompts = body.prompts(talk)
        for ids, _ in prompts:
            talk.check(ids)
    except ValueError as error:
        param = "messages" if chat else "prompt"
        raise Refused(400, f"{param}: {error}", param) from error
    if len(prompts) * body.n > MOST_CHOICES:
        raise Refused(400, f"{len(prompts)} prompts with n={body.n} are over {MOST_CHOICES} choices", "n")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    own = body.model_dump(include={"max_tokens", "temperature", "top_p", "top_k"}, exclude_none=True)
    sampling = replace(config.params(seed=seed), **own)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    common = {"id": f"{'chat' * chat}cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    common["object"] = "chat.completion.chunk" if chat else "text_completion"
    common |= {"usage": None} if body.stream_options.get("include_usage") else {}
    for index, ((ids, opened), _) in enumerate(itertools.product(prompts, range(body.n))):
        first = True
        for piece in talk.stream(ids, opened, replace(sampling, first_index=index << 20), stops):
            yield common | {"choices": [{"index": index, **choice_of(talk.tokenizer, body, piece, first)}]}
            tokens, first = tokens + len(piece.token_ids), False
    asked = sum(len(ids) for ids, _ in prompts)
    usage = {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens}
    yield common | {"choices": [], "usage": usage}


def choice_of(tokenizer: Tokenizer, body: TextBody | ChatBody, piece: Piece, first: bool) -> dict[str, Any]:
    """A piece of a choice, the first with every key of its text."""
    tokens, logprobs = [str(tokenizer.decode([i])) for i in piece.token_ids], piece.logprobs
    if isinstance(body, TextBody):
        out: dict[str, Any] = {"text": "".join(text for _, text in piece.texts)}
        found: Any = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": None}
    else:
        texts = {"role": "assistant", "content": "", "reasoning_content": ""} if first else {}
        for part, text in piece.texts:
            key = "content" if part == "answer" else "reasoning_content"
            texts[key] = texts.get(key, "") + text
        out = {"delta": texts}
        data = [None if UNFINISHED in token else [*token.encode()] for token in tokens]
        every = zip(tokens, logprobs, data, strict=True)
        found = {"content": [{"token": t, "logprob": p, "bytes": b, "top_logprobs": []} for t, p, b in every]}
    wanted = body.logprobs is not None and body.logprobs is not False  # 0 asks for them
    return out | {"finish_reason": piece.finish_reason or None} | ({"logprobs": found} if wanted else {})


def merge(parts: Sequence[Any]) -> Any:
    """Pieces as one: strings and lists laid end to end, objects by key; of all else the last."""
    match parts[0]:
        case str():
            return "".join(parts)
        case list():
            return list(itertools.chain.from_iterable(parts))
        case dict():
            keys = dict.fromkeys(key for part in parts for key in part)
            return {key: merge([part[key] for part in parts if key in part]) for key in keys}
    return parts[-1]


def join_chunks(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The chunks of an answer as one object."""
    choices = []
    for _, pieces in itertools.groupby((c["choices"][0] for c in chunks[:-1]), lambda piece: piece["index"]):
        merged = merge(list(pieces))
        choices.append({"message" if key == "delta" else key: value for key, value in merged.items()})
    return chunks[-1] | {"object": chunks[-1]["object"].removesuffix(".chunk"), "choices": choices}
