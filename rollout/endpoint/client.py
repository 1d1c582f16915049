"""OpenAI's client: the address, what an answer holds, and what to do about each error."""

import json
import os
import reprlib
from typing import Any
from urllib.parse import urlsplit

from rollout.settings import EndpointSettings
from rollout.types import FinishReason

REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "length",  # the server cut it; what there is counts, as of any cut completion
    "tool_calls": "stop",  # of tools that were never offered: an answer without text
    "function_call": "stop",
}
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "exceeded_current_quota_error")
"""Codes of a status 429 that no waiting mends."""
MOST_TOKENS = 1 << 24
"""Of one completion; a `usage` with more is no count."""


class Nonsense(ValueError):
    """An answer that is no chat completion."""


def address() -> str:
    """Where requests go, without credentials. Raises `ValueError`: neither address nor key is set, or the
    address is none."""
    url = os.environ.get("OPENAI_BASE_URL")
    if not url and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("engine endpoint needs OPENAI_BASE_URL, such as http://127.0.0.1:8000/v1.")
    try:
        parts = urlsplit(url or "https://api.openai.com/v1")
    except ValueError as error:
        raise ValueError(f"OPENAI_BASE_URL is no address: {error}") from error
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def connect(settings: EndpointSettings) -> Any:
    """The client of the address and key in the environment.
    Raises `ModuleNotFoundError`: it is not installed; `ValueError`: it cannot use them."""
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("engine endpoint needs openai: pip install -e '.[endpoint]'") from error

    key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers read none, the client wants one
    try:
        key.encode("ascii")
        transport = openai.DefaultHttpxClient(event_hooks={"response": [end_retries]})
        retries, timeout = settings.retries, settings.timeout_s
        return openai.OpenAI(api_key=key, http_client=transport, max_retries=retries, timeout=timeout)
    except Exception as error:  # of the client, its transport, or the encoding
        raise ValueError(f"OPENAI_BASE_URL or OPENAI_API_KEY cannot be used: {error}") from error


def end_retries(response: Any) -> None:
    """Have the client not retry a status 429 that means an exhausted quota."""
    if response.status_code == 429:
        response.read()
        if no_quota(response):
            response.headers["x-should-retry"] = "false"


def no_quota(response: Any) -> bool:
    """Whether a response says that the quota is used up, and not that requests come too fast."""
    used_up = response.status_code == 429 and any(code in response.text for code in NO_QUOTA)
    return used_up or response.status_code == 402


def completion(text: str) -> tuple[str, int | None, str]:
    """An answer's text with the thinking in think tags, its number of tokens where `usage` has it, and its
    finish reason, a key of `REASONS`. Raises `Nonsense`."""
    try:
        answer = json.loads(text)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message, reason, tokens = choice["message"], choice["finish_reason"], usage.get("completion_tokens")
        said = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        known = reason in REASONS and (tokens is None or (type(tokens) is int and 0 <= tokens <= MOST_TOKENS))
        if not known or not isinstance(said, str) or not isinstance(thought, str):
            raise ValueError
        said += (
            choice["stop_reason"] if isinstance(choice.get("stop_reason"), str) else ""
        )  # vLLM's stop string
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise Nonsense(f"no chat completion: {reprlib.repr(text)}") from None
    if thought.strip():
        closed = "\n</think>\n" if said or reason != "length" else ""  # else it was cut in its thinking
        said = f"<think>\n{thought.strip()}{closed}{said}"
    elif "</think>" in said and "<think>" not in said:
        said = f"<think>\n{said.lstrip()}"  # the server's chat template opened it
    return said, tokens, reason


def explain(error: Any, settings: EndpointSettings, body: dict[str, Any], models: list[str]) -> str:
    """One line for an `openai.OpenAIError`: what happened, what to do."""
    import openai

    where, tries = f"the endpoint {address()}", f"after {settings.retries} retries"
    said = " ".join(str(getattr(error, "message", error)).split())[:300]
    status = getattr(error, "status_code", 0)
    if isinstance(error, openai.APITimeoutError):
        way = "raise endpoint.timeout_s, or lower max_tokens or endpoint.in_flight"
        return f"{where} did not answer within {settings.timeout_s:g} s, {tries}; {way}."
    if isinstance(error, openai.APIConnectionError):
        why = " ".join(f"{error.__cause__ or said}".split())[:200]
        return f"{where} cannot be reached, or breaks off ({why}), {tries}; check OPENAI_BASE_URL and the server."
    if status in (401, 403):
        return f"{where} refuses the key: {said}; set OPENAI_API_KEY."
    if status and no_quota(error.response):
        return f"{where}: the quota is used up: {said}; add to it, or take another OPENAI_API_KEY."
    if status == 429:
        way = "lower endpoint.in_flight, raise endpoint.retries, or wait"
        return f"{where} limits the rate of requests, {tries}: {said}; {way}."
    if status in (404, 405):
        there = f"; it has: {', '.join(models[:20])}" if models else ". OPENAI_BASE_URL mostly ends in /v1"
        return f"{where} has no model {body.get('model')}: {said}{there}."
    if 400 <= status < 500:
        named = getattr(error, "param", None) or next((key for key in body if key in said), "the request")
        value = f"={body[named]!r}" if named in body and named != "messages" else ""
        way = "endpoint.send_seed false sends none" if named == "seed" else "choose another value"
        return f"{where} refuses {named}{value} (status {status}): {said}; {way}."
    return f"{where} fails ({status or type(error).__name__}), {tries}: {said}; see its log."
