"""The engine over an OpenAI-compatible API: what it sends, what it reads, each fault by name."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from model.transformer import Transformer
from rollout.endpoint.engine import EndpointEngine, byte_tokenizer, completion
from rollout.engine import EngineDied, Unanswerable
from rollout.open import engine_for
from rollout.settings import EndpointSettings, RolloutSettings
from rollout.text.tokenizer import completion_text, make_prompt
from rollout.types import Problem, SamplingParams
from tests.fake_endpoint import FakeEndpoint, chat, error, running
from tests.small import prompt, tiny

TOKENIZER = byte_tokenizer()
ONCE = SamplingParams(max_tokens=50, temperature=0.6, top_p=0.9, seed=3)


def prompts(*questions: str, template: str = "boxed") -> list[Any]:
    return [make_prompt(TOKENIZER, Problem(q, "math", q), template) for q in questions]


@pytest.fixture
def start(monkeypatch):
    """`start(says, **settings)`: a fake server and the engine over it; no wait between repetitions."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    with ExitStack() as stack:

        def begin(says=lambda body, n: chat(), model: str = "m", **settings: Any):
            fake = says if isinstance(says, FakeEndpoint) else FakeEndpoint(says)
            monkeypatch.setenv("OPENAI_BASE_URL", stack.enter_context(running(fake)))
            monkeypatch.setenv("OPENAI_API_KEY", "secret")
            own = EndpointSettings(**{"retries": 1, **settings})
            engine = EndpointEngine(model, RolloutSettings(engine="endpoint", endpoint=own))
            stack.callback(engine.close)
            return fake, engine

        yield begin


def test_a_request_has_the_templates_text_and_every_setting(start):
    fake, engine = start(lambda body, n: chat("so \\boxed{4}", tokens=9))
    params = SamplingParams(30, 0.5, 0.8, 7, n=2, seed=1, stop=("END",), min_tokens=2)
    rollouts = sorted(engine.generate(prompts("2+2?", "1+1?"), params), key=lambda r: (r.index, r.sample))
    assert [(r.index, r.sample) for r in rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert set(fake.keys) == {"Bearer secret"}
    body = next(b for b in fake.bodies if "2+2?" in b["messages"][0]["content"])
    sent = {"model": "m", "max_tokens": 30, "temperature": 0.5, "top_p": 0.8, "stop": ["END"], "top_k": 7}
    assert {k: v for k, v in body.items() if k not in ("messages", "seed")} == sent | {"min_tokens": 2}
    (message,) = body["messages"]
    assert message["role"] == "user" and message["content"].startswith("2+2?\nPlease reason step by step")
    for r in rollouts:
        assert (len(r.token_ids), r.finish_reason, r.text) == (9, "stop", "so \\boxed{4}")
        assert all(map(math.isnan, r.logprobs)) and len(r.logprobs) == 9
        assert completion_text(TOKENIZER, r, "r1") == "so \\boxed{4}", "no prefill: the text is complete"


def test_seeds_differ_by_index_and_sample_and_not_by_how_a_request_is_split(start):
    fake, engine = start()
    params = SamplingParams(5, n=2, seed=8)
    list(engine.generate(prompts("a", "b"), params))
    whole = {(b["messages"][0]["content"], b["seed"]) for b in fake.bodies}
    assert len({seed for _, seed in whole}) == 4 and all(0 <= seed < 2**31 for _, seed in whole)
    fake.bodies.clear()
    list(engine.generate(prompts("a"), params))
    list(engine.generate(prompts("b"), SamplingParams(5, n=2, seed=8, first_index=1)))
    assert {(b["messages"][0]["content"], b["seed"]) for b in fake.bodies} == whole
    fake.bodies.clear()
    list(engine.generate(prompts("a"), SamplingParams(5, n=2, seed=9)))
    assert not {(b["messages"][0]["content"], b["seed"]) for b in fake.bodies} & whole
    _, engine = start(fake, send_seed=False)
    list(engine.generate(prompts("a"), ONCE))
    assert "seed" not in fake.bodies[-1] and "top_k" not in fake.bodies[-1] and "stop" not in fake.bodies[-1]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_at_most_in_flight_requests_are_open_at_once(start, in_flight):
    def slow(body, n):
        time.sleep(0.05)
        return chat()

    fake, engine = start(slow, in_flight=in_flight)
    assert len(list(engine.generate(prompts(*"abcdefgh"), ONCE))) == 8
    assert fake.most_at_once == in_flight


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (chat("4", reasoning_content="2+2"), ("<think>\n2+2\n</think>\n4", 7, "stop")),
        (chat("4", reasoning=" 2+2\n"), ("<think>\n2+2\n</think>\n4", 7, "stop")),
        (chat(None, "length", reasoning="2+"), ("<think>\n2+", 7, "length")),
        (chat(None, "stop", reasoning="2+"), ("<think>\n2+\n</think>\n", 7, "stop")),
        (chat("2+2\n</think>\n4"), ("<think>\n2+2\n</think>\n4", 7, "stop")),
        (chat("<think>\n2+2\n</think>\n4"), ("<think>\n2+2\n</think>\n4", 7, "stop")),
        (chat("4", tokens=None), ("4", None, "stop")),
        (chat(None, "content_filter", 0), ("", 0, "content_filter")),
        (chat(None, "tool_calls", tool_calls=[{}]), ("", 7, "tool_calls")),
    ],
)  # fmt: skip
def test_what_an_answer_says(reply, expected):
    assert completion(reply[2].decode()) == expected


def test_vllm_names_the_stop_string_and_it_is_kept(start):
    reply = chat("2+2")[2].replace(b'"index": 0', b'"index": 0, "stop_reason": "END"')
    assert completion(reply.decode())[0] == "2+2END"
    assert completion(reply.replace(b'"END"', b"1234").decode())[0] == "2+2", "a stop token"


def test_strange_answers_count_and_are_said(start, capsys):
    replies = [chat(None, "content_filter", 0), chat("é", tokens=None), chat("", tokens=1), chat()]
    _, engine = start(lambda body, n: replies[n], in_flight=1)
    found = list(engine.generate(prompts(*"abcd"), ONCE))
    assert [(r.text, len(r.token_ids), r.finish_reason) for r in found] == [
        ("", 0, "length"), ("é", 2, "stop"), ("", 1, "stop"), ("4", 7, "stop"),
    ]  # fmt: skip
    said = "of 4 completions 1 ended by content_filter, 2 without text, 1 without usage, so that their length"
    assert said in capsys.readouterr().err


def test_a_rate_limit_is_waited_for_as_the_server_says(start):
    def says(body, n):
        return error(429, "slow down", {"Retry-After": "1"}, code="rate_limit_exceeded") if n == 0 else chat()

    fake, engine = start(says)
    began = time.monotonic()
    assert len(list(engine.generate(prompts("a"), ONCE))) == 1
    assert time.monotonic() - began > 0.9 and len(fake.bodies) == 2


NO_ANSWER = (200, {"Content-Length": "5000"}, b'{"choices": [{"mess')
HTML = {"Content-Type": "text/html"}
FAULTS = {
    "rate limit": (error(429, "slow down"), 2, ["slow down", "after 1 retries", "lower endpoint.in_flight"]),
    "quota": (error(429, "You exceeded it", code="insufficient_quota"), 1, ["quota is used up"]),
    "quota by type": (error(429, "Exceeded", type="insufficient_quota", code="429"), 1, ["quota is used up"]),
    "balance": (error(402, "Insufficient Balance"), 1, ["quota is used up", "Insufficient Balance"]),
    "key": (error(401, "no such key: secret"), 1, ["refuses the key", "such key: KEY", "OPENAI_API_KEY"]),
    "model": (error(404, "no such model"), 1, ["has no model m, but m, other"]),
    "server": (error(500, "out of memory"), 2, ["failed after 1 retries", "out of memory", "see the server"]),
    "page of a proxy": ((502, HTML, b"<html>bad gateway</html>"), 2, ["failed after 1 retries", "502"]),
    "page": ((200, HTML, b"<html>hello</html>"), 2, ["no chat completion", "<html>"]),
    "no choices": ((200, {}, b'{"choices": []}'), 2, ["no chat completion"]),
    "null": ((200, {}, b"null"), 2, ["no chat completion"]),
    "error with status 200": ((200, {}, b'{"error": {"message": "busy"}}'), 2, ["completion", "busy"]),
    "no message": ((200, {}, b'{"choices": [{"finish_reason": "stop"}]}'), 2, ["no chat completion"]),
    "content is a list": (chat([1]), 2, ["no chat completion"]),
    "reason unknown": (chat("a", "error"), 2, ["no chat completion"]),
    "reason is null": (chat("a", None), 2, ["no chat completion"]),
    "tokens below 0": (chat("a", tokens=-1), 2, ["no chat completion"]),
    "tokens beyond sense": (chat("a", tokens=10**15), 2, ["no chat completion"]),
    "cut": (NO_ANSWER, 2, ["Connection error. (RemoteProtocolError: ", "after 1 retries"]),
    "half of an object": ((200, {}, b'{"choices": [{"mess'), 2, ["no chat completion"]),
    "garbage for gzip": ((200, {"Content-Encoding": "gzip"}, b"no gzip"), 2, ["after 1 retries"]),
    "param is a list": (error(400, "what?", param=[1]), 1, ["refuses [1]: ", "what?"]),
    "no answer": (None, 2, ["timed out", "raise endpoint.timeout_s"]),
    "seed": (error(422, "extra input", param="seed"), 1, ["refuses seed=", "endpoint.no-send-seed"]),
    "temperature": (error(400, "Unsupported value: 'temperature'"), 1, ["refuses temperature=0.6"]),
    "context": (error(400, "max_tokens is too large: 50"), 1, ["refuses max_tokens=50", "too large"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_line_and_what_was_sampled_is_kept(start, name):
    reply, requests, says = FAULTS[name]
    fake, engine = start(lambda body, n: chat() if n < 2 else reply, in_flight=1, timeout_s=0.3)
    kept = []
    with pytest.raises(EngineDied) as caught:
        for rollout in engine.generate(prompts(*"abcdef"), ONCE):
            kept.append(rollout.index)
    text = str(caught.value)
    assert kept == [0, 1] and len(fake.bodies) == 2 + requests
    assert all(part in text for part in says) and "\n" not in text and len(text) < 600, text
    assert engine.address in text and "secret" not in text


@pytest.mark.parametrize("pause", [0.1, 0.0])
def test_an_answer_without_end_is_given_up(start, monkeypatch, pause):
    """Spaces, as some servers send to keep the connection open: for longer than timeout_s, or too many."""

    def send(self, status, headers, data):
        self.send_response(status)
        self.end_headers()
        with suppress(OSError):
            for _ in range(100):
                self.wfile.write(b" " * (1 << 20))
                time.sleep(pause)

    _, engine = start(lambda body, n: (200, {}, b""), timeout_s=0.5 if pause else 60, retries=0)
    monkeypatch.setattr("tests.fake_endpoint.send", send)
    began = time.monotonic()
    with pytest.raises(EngineDied, match=r"answers without an end, \d+ bytes so far; see the server"):
        list(engine.generate(prompts("a"), ONCE))
    assert time.monotonic() - began < 3


def test_a_fault_that_passes_costs_nothing(start):
    faults = [error(500, "a"), NO_ANSWER, (200, {}, b"<html>"), (200, {}, b"[]")]
    fake, engine = start(lambda body, n: faults[n] if n < 4 else chat(), in_flight=1, retries=4)
    assert len(list(engine.generate(prompts(*"ab"), ONCE))) == 2 and len(fake.bodies) == 6


def test_requests_under_way_are_yielded_before_the_error(start):
    def says(body, n):
        if body["messages"][0]["content"].startswith("bad"):
            return error(401, "no")
        time.sleep(0.3)
        return chat()

    _, engine = start(says, in_flight=3)
    kept = []
    with pytest.raises(EngineDied, match="refuses the key"):
        for rollout in engine.generate(prompts("good", "bad", "fine", *"abcdef"), ONCE):
            kept.append(rollout.index)
    assert sorted(kept) == [0, 2]


def test_newer_models_call_the_limit_otherwise(start):
    def says(body, n):
        wrong = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return error(400, wrong, param="max_tokens") if "max_tokens" in body else chat()

    fake, engine = start(says, in_flight=1, retries=0)
    assert len(list(engine.generate(prompts(*"ab"), ONCE))) == 2
    assert [b.get("max_completion_tokens") for b in fake.bodies] == [None, 50, 50]


@pytest.mark.parametrize(
    "models", [(200, {}, b"<html>"), (200, {}, b'{"data": 5}'), error(401, "no"), (404, {}, b"")]
)
def test_a_server_without_a_list_of_its_models(start, models):
    fake = FakeEndpoint(lambda body, n: error(404, "no such model"))
    fake.models = models
    with pytest.raises(EngineDied, match=r"has no model m.*: .*no such model; take a model that it has"):
        list(start(fake, retries=0)[1].generate(prompts("a"), ONCE))


def ask_once() -> None:
    engine = EndpointEngine("m", RolloutSettings(endpoint=EndpointSettings(retries=0)))
    list(engine.generate(prompts("a"), ONCE))


@pytest.mark.parametrize(
    ("url", "key", "says"),
    [
        ("", "", "needs OPENAI_BASE_URL"),
        ("http://127.0.0.1:9/v1", "", "Connection error"),
        ("me:hid@127.0.0.1:9/v1", "", "cannot be used: it must begin with http://HOST or https://HOST$"),
        ("ftp://127.0.0.1/v1", "", "it must begin with http"),
        ("http://[bad", "", "OPENAI_BASE_URL"),
        (
            "http://127.0.0.1:9/v1",
            "schlüssel",
            "OPENAI_API_KEY cannot be used: the key is not printable ASCII",
        ),
        ("http://127.0.0.1:9/v1", "hid\nden", "the key is not printable ASCII"),
    ],
)
def test_an_environment_that_is_wrong(monkeypatch, url, key, says):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises((EngineDied, ValueError), match=says):
        ask_once()


def test_credentials_of_the_address_are_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:hidden@127.0.0.1:9/v1?token=hidden")
    with pytest.raises(EngineDied) as caught:
        ask_once()
    assert "http://127.0.0.1:9/v1" in str(caught.value) and "hidden" not in str(caught.value)


def test_it_is_refused_where_token_ids_are_needed(start, tokenizer):
    _, engine = start()
    for call in (
        lambda: engine.generate([prompt(3, 4)], ONCE),
        lambda: engine.generate(prompts("a"), SamplingParams(5, stop_token_ids=(1,))),
    ):
        with pytest.raises(Unanswerable, match="takes text"):
            call()
    with pytest.raises(ValueError, match="no token ids to train on"):
        engine_for(Transformer(tiny(97), seed=0), tokenizer, RolloutSettings(engine="endpoint"))
    with pytest.raises(ValueError, match=r"workers=2 must be 0 .*in_flight"):
        RolloutSettings(engine="endpoint", workers=2)
