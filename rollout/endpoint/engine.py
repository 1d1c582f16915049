"""An OpenAI-compatible API as an engine: any served model, sampled in text.

Each rollout is one chat request: the template's text as the only message, without system prompt or prefill,
inside the server's own chat template. A setting that the server refuses is an error that names it; top_k 0 is
not sent, since the API does not know it. Address and key are OPENAI_BASE_URL and OPENAI_API_KEY, as for
OpenAI's client, which also retries: lost connections, timeouts, rate limits, server errors.

An API returns no token ids. A rollout has zeros in their place, as many as the server's `usage` counts, NaN
as log-probabilities, and its `text`. Nothing can be trained on such tokens.
"""

import hashlib
import json
import os
import queue
import reprlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerFast

from rollout.engine import EngineDied, RolloutEngine, Unanswerable
from rollout.settings import RolloutSettings
from rollout.text.templates import template_named
from rollout.text.tokenizer import train_tokenizer
from rollout.types import FinishReason, Prompt, Rollout, SamplingParams

REASONS: dict[str, FinishReason] = {
    **{"stop": "stop", "length": "length"},
    "content_filter": "length",  # the server cut it; what there is counts, as of any cut completion
    **{"tool_calls": "stop", "function_call": "stop"},  # no tool was offered: an answer without text
}
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "exceeded_current_quota_error")
"""Codes of a status 429 that no waiting mends."""
LONGEST = 16 << 20  # bytes of an answer
ADVICE = {
    0: "check OPENAI_BASE_URL and the server, or raise endpoint.timeout_s",
    400: "choose another value; endpoint.no-send-seed sends no seed",
    401: "set OPENAI_API_KEY",
    402: "the quota is used up: add to it, or take another OPENAI_API_KEY",
    404: "take a model that it has; OPENAI_BASE_URL mostly ends in /v1",
    429: "lower endpoint.in_flight, raise endpoint.retries, or wait",
    500: "see the server's log",
}
"""By status; 0 = no answer."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Stands for the unknown tokenizer of a served model: a token a byte, and messages as JSON."""
    tokenizer = train_tokenizer([], 265)
    tokenizer.chat_template = "{{ messages | tojson }}"
    return tokenizer


def address() -> str:
    """Where requests go, without credentials. Raises `ValueError`: no address, or none of the web."""
    url = os.environ.get("OPENAI_BASE_URL")
    if not url and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("engine endpoint needs OPENAI_BASE_URL, such as http://127.0.0.1:8000/v1.")
    parts = urlsplit(url or "https://api.openai.com/v1")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must begin with http://HOST or https://HOST")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def no_quota(response: Any) -> bool:
    """Whether a response says that the quota is used up, and not that requests come too fast; then the client
    must not retry it."""
    if response.status_code == 429 and any(code in response.read().decode() for code in NO_QUOTA):
        response.headers["x-should-retry"] = "false"
        return True
    return bool(response.status_code == 402)


def read_bounded(response: Any) -> None:
    """Read a response as its `read` does, but for no longer than its timeout, which alone is one for each
    piece: a server may send spaces forever to keep the connection. Raises `ValueError`: it is longer."""
    data, end = bytearray(), time.monotonic() + response.request.extensions["timeout"]["read"]
    for piece in response.iter_bytes():
        data += piece
        if len(data) > LONGEST or time.monotonic() > end:
            raise ValueError(f"without an end, {len(data)} bytes so far")
    response._content = bytes(data)


def completion(text: str) -> tuple[str, int | None, str]:
    """An answer's text with the thinking in think tags, its number of tokens where `usage` has it, and its
    finish reason, a key of `REASONS`. Raises `ValueError`: it is no chat completion."""
    try:
        answer = json.loads(text)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message, reason, tokens = choice["message"], choice["finish_reason"], usage.get("completion_tokens")
        said = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        counted = tokens is None or (type(tokens) is int and 0 <= tokens < 1 << 24)  # more is no count
        if reason not in REASONS or not (counted and isinstance(said, str) and isinstance(thought, str)):
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"with no chat completion: {reprlib.repr(text)}") from None
    said += end if isinstance(end := choice.get("stop_reason"), str) else ""  # vLLM's: the stop string
    if thought.strip():
        closed = "\n</think>\n" if said or reason != "length" else ""  # else it was cut in its thinking
        said = f"<think>\n{thought.strip()}{closed}{said}"
    elif "</think>" in said and "<think>" not in said:
        said = f"<think>\n{said.lstrip()}"  # the server's chat template opened it
    return said, tokens, reason


class EndpointEngine(RolloutEngine):
    """`RolloutEngine` over `POST /chat/completions`."""

    def __init__(self, model: Path | str, settings: RolloutSettings, *, policy: Any = None, **_: Any) -> None:
        """Raises `ValueError`: an environment that cannot be used, or a `policy` to generate from;
        `ModuleNotFoundError`: no client."""
        if policy is not None:
            uses = "reject takes it, and evaluate and generate as --engine endpoint"
            raise ValueError(f"rollout.engine = 'endpoint' returns no token ids to train on; {uses}.")
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("engine endpoint needs openai: pip install -e '.[endpoint]'") from error
        self.model, self.settings = str(model), settings.endpoint
        self.tokenizer = byte_tokenizer()
        self.limit = "max_tokens"  # newer models of OpenAI call it max_completion_tokens
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # the client needs one
        try:
            if not (key.isascii() and key.isprintable()):
                raise ValueError("the key is not printable ASCII")
            self.address = address()
            http = openai.DefaultHttpxClient(event_hooks={"response": [read_bounded, no_quota]})
            retries, timeout = self.settings.retries, self.settings.timeout_s
            self.client = openai.OpenAI(api_key=key, http_client=http, max_retries=retries, timeout=timeout)
        except Exception as error:  # of the client, its transport, or the encoding
            raise ValueError(f"OPENAI_BASE_URL or OPENAI_API_KEY cannot be used: {error}") from error

    def died(self, error: Any, body: dict[str, Any]) -> EngineDied:
        """What happened to a request, and what to do, in one line."""
        status = getattr(error, "status_code", 0)
        said, key = str(getattr(error, "message", error)), self.client.api_key
        said = " ".join((said.replace(key, "KEY") if len(key) > 5 else said).split())[:300]
        what = f"failed after {self.settings.retries} retries"
        if status and no_quota(error.response):
            status, what = 402, "refuses more requests"
        elif status in (401, 403):
            status, what = 401, "refuses the key"
        elif status in (404, 405):
            status, what = 404, f"has no model {self.model}"
            with suppress(Exception):  # some have no list
                what += f", but {', '.join(str(served.id) for served in self.client.models.list().data[:20])}"
        elif 400 <= status < 500 and status != 429:
            named = getattr(error, "param", None), *(key for key in body if key in said), "the request"
            name = next(str(of) for of in named if of)
            value = f"={body[name]!r}" if name in body and name != "messages" else ""
            status, what = 400, f"refuses {name}{value}"
        elif not status and error.__cause__:
            said += f" ({type(error.__cause__).__name__}: {error.__cause__})"
        return EngineDied(f"the endpoint {self.address} {what}: {said}; {ADVICE.get(status, ADVICE[500])}.")

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """As `RolloutEngine.generate`. Raises `Unanswerable`: a prompt without text, or stop tokens; and
        `EngineDied`, with what to do, after everything that was sampled has been yielded."""
        if sampling.stop_token_ids or not all(prompt.problem.question for prompt in prompts):
            raise Unanswerable("engine endpoint takes text, neither prompts of token ids nor stop_token_ids.")
        return self.sampled(prompts, sampling)

    def sampled(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """The rollouts as they come, `in_flight` requests at a time. Daemon threads: they delay no exit."""
        pairs = [(i, s) for i in range(len(prompts)) for s in range(sampling.n)]
        workers = running = min(self.settings.in_flight, len(pairs))
        todo = [*[None] * workers, *pairs[::-1]]  # taken from its end, and a None ends a worker
        done: queue.SimpleQueue[Rollout | Exception | None] = queue.SimpleQueue()
        odd, failed = list[str](), list[Exception]()

        def work() -> None:
            while job := todo.pop():
                try:
                    done.put(self.ask(prompts[job[0]], *job, sampling, odd))
                except Exception as error:  # raised again in the caller's thread
                    del todo[workers:]
                    done.put(error)
            done.put(None)

        for _ in range(workers):
            threading.Thread(target=work, daemon=True).start()
        try:
            while running:
                found = done.get()
                if isinstance(found, Rollout):
                    yield found
                running -= found is None
                failed += [found] if isinstance(found, Exception) else []
        finally:
            del todo[workers:]
        if odd:
            told = ", ".join(f"{number} {what}" for what, number in sorted(Counter(odd).items()))
            print(f"endpoint: of {len(pairs)} completions {told}", file=sys.stderr)
        if failed:
            raise failed[0]

    def ask(self, prompt: Prompt, index: int, sample: int, params: SamplingParams, odd: list[str]) -> Rollout:
        """One rollout; what is strange about it goes into `odd`. Its seed is a hash of (seed, index, sample),
        of 31 bits, which every server takes."""
        name = f"{params.seed} {params.first_index + index} {sample}".encode()
        text = str(self.tokenizer.decode(list(prompt.token_ids), clean_up_tokenization_spaces=False))
        messages = [{"role": "user", "content": text}]
        if template_named(prompt.template).chat:  # a think tag may follow, which is the server's to open
            messages, _ = json.JSONDecoder().raw_decode(text)
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body |= {"temperature": params.temperature, "top_p": params.top_p}
        if self.settings.send_seed:
            body["seed"] = int.from_bytes(hashlib.sha256(name).digest()[:4], "little") >> 1
        body |= {"stop": list(params.stop)} if params.stop and not params.ignore_eos else {}
        more = {key: v for key in ("top_k", "min_tokens", "ignore_eos") if (v := getattr(params, key))}
        text, tokens, reason = self.answer(body, params.max_tokens, more)
        odd += [] if reason in ("stop", "length") else [f"ended by {reason}"]
        odd += [] if text.strip() else ["without text"]
        odd += ["without usage, so that their length is in bytes"] if tokens is None else []
        n = len(text.encode(errors="replace")) if tokens is None else tokens
        return Rollout(prompt, index, sample, [0] * n, [float("nan")] * n, REASONS[reason], text=text)

    def answer(self, body: dict[str, Any], limit: int, more: dict[str, Any]) -> tuple[str, int | None, str]:
        """See `completion`. `more` is what vLLM, SGLang and others add to the API. An answer that is none is
        requested again, as often as the client retries a request. Raises `EngineDied`."""
        import openai

        for left in range(self.settings.retries, -1, -1):
            own = body | {self.limit: limit}
            try:
                raw = self.client.chat.completions.with_raw_response.create(**own, extra_body=more or None)
                return completion(raw.text)
            except openai.OpenAIError as error:
                if "max_tokens" not in own or "max_completion_tokens" not in str(error):
                    raise self.died(error, own | more) from error
                self.limit = "max_completion_tokens"
                break
            except ValueError as error:
                if not left:
                    said = f"the endpoint {self.address} answers {error}; {ADVICE[500]}."
                    raise EngineDied(said) from error
        return self.answer(body, limit, more)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
