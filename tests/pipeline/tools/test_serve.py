"""`serve`, asked by OpenAI's client: what is served is right, what is not is refused by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from pipeline.settings.tools import ServeSettings
from pipeline.tools.conversation import Conversation
from pipeline.tools.serve import Endpoint
from tests.small import random_policy

ASKED: dict[str, Any] = {"model": "m", "max_tokens": 20, "temperature": 0}
QUESTION = [{"role": "user", "content": "3+4=?"}]


@pytest.fixture(scope="module")
def settings(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    folder = random_policy(path, tokenizer, "r1", initializer_range=0.2, max_position_embeddings=128)
    return ServeSettings(model=folder, threads=1, port=0, name="m", api_key="secret", timeout_s=60)


@pytest.fixture(scope="module")
def endpoint(settings) -> Iterator[Endpoint]:
    made = Endpoint(settings, Conversation(settings))
    yield made
    made.talk.engine.close()


@pytest.fixture(scope="module")
def url(endpoint, running) -> Iterator[str]:
    with running(endpoint) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60) as made:
        yield made


def ask(client: openai.OpenAI, chat: bool, **more: Any) -> Any:
    if chat:
        return client.chat.completions.create(**{"messages": QUESTION, **ASKED, **more})
    return client.completions.create(**{"prompt": "User: 3+4=?", **ASKED, **more})


def words(choice: Any, chat: bool, part: str = "message") -> str:
    """Thinking and answer."""
    if not chat:
        return choice.text
    said = getattr(choice, part)
    return (getattr(said, "reasoning_content", "") or "") + (said.content or "")


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_whole_in_pieces(client, chat):
    whole = ask(client, chat, n=2, logprobs=True if chat else 0)
    assert whole.usage.completion_tokens <= 40 and whole.usage.prompt_tokens > 3
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(ask(client, chat, n=2, logprobs=True if chat else 0, stream=True,
                      stream_options={"include_usage": True}))  # fmt: skip
    *chunks, last = chunks
    assert last.usage == whole.usage and not last.choices and len(chunks) > 3
    assert all(chunk.usage is None for chunk in chunks)
    tokens = 0
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(words(c, chat, "delta") for c in own) == words(choice, chat) != ""
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        if chat:
            entries = choice.logprobs.content
            assert (
                entries == [e for c in own for e in c.logprobs.content] and choice.message.role == "assistant"
            )
            assert all(e.logprob <= 0 and e.top_logprobs == [] for e in entries)
            assert all(e.bytes is None or bytes(e.bytes).decode() == e.token for e in entries)
        else:
            entries = choice.logprobs.token_logprobs
            assert len(entries) == len(choice.logprobs.tokens) and max(entries) <= 0
        tokens += len(entries)
    assert tokens == whole.usage.completion_tokens
    if chat:  # the prompt opened the think tag, and a random model does not close it
        assert whole.choices[0].message.reasoning_content
    assert not any(c.usage for c in ask(client, chat, stream=True))


def test_seed_prompt_and_choice_fix_a_completion(client):
    one, same, other = (
        [c.text for c in ask(client, False, n=3, temperature=1, seed=s).choices] for s in (1, 1, 2)
    )
    assert one == same and len({*one, *other}) == 6
    assert ask(client, False, temperature=1, seed=1).choices[0].text == one[0]
    assert (
        ask(client, False, temperature=1).choices[0].text != ask(client, False, temperature=1).choices[0].text
    )


def test_prompts_are_texts_or_ids_one_or_several(client, endpoint):
    ids = [endpoint.talk.tokenizer.encode(text) for text in ("User: 3+4=?", "b")]
    texts = ask(client, False, prompt=["User: 3+4=?", "b"])
    assert [c.index for c in texts.choices] == [0, 1]
    assert texts.choices == ask(client, False, prompt=ids).choices
    assert texts.choices[0].text == ask(client, False).choices[0].text
    assert texts.choices[0] == ask(client, False, prompt=ids[0]).choices[0]
    assert texts.usage.prompt_tokens == sum(map(len, ids))


def test_a_message_has_one_text_or_parts(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "3+"}, {"type": "text", "text": "4=?"}]}]
    whole = ask(client, True)
    assert ask(client, True, messages=parts).choices == whole.choices
    said = whole.choices[0].message.model_dump()  # goes back as it came
    assert (
        ask(client, True, messages=[*QUESTION, said, *QUESTION]).usage.prompt_tokens
        > whole.usage.prompt_tokens
    )
    orders = [{"role": role, "content": "Be brief."} for role in ("system", "developer")]
    one, other = (ask(client, True, messages=[order, *QUESTION]) for order in orders)
    assert one.choices == other.choices and one.usage == other.usage


@pytest.mark.parametrize("chat", [True, False])
def test_a_stop_string_ends_the_text_before_it(client, chat):
    text = words(ask(client, chat).choices[0], chat)
    stop = text[len(text) // 2 :][:3]
    for given in (stop, ["never said", stop]):
        choice = ask(client, chat, stop=given).choices[0]
        assert words(choice, chat) == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_max_completion_tokens_is_max_tokens(client):
    made = client.chat.completions.create(
        model="m", messages=QUESTION, temperature=0, max_completion_tokens=20
    )
    assert made.choices == ask(client, True).choices


NEUTRAL = {
    "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "top_p": None,
    "seed": None, "n": None, "stop": None, "stream": False,
}  # fmt: skip


def test_what_changes_nothing_is_taken(client):
    chat = {"tools": [], "response_format": {"type": "text"}, "tool_choice": "none", "store": False,
            "metadata": {"a": "b"}, "parallel_tool_calls": True}  # fmt: skip
    assert ask(client, True, **NEUTRAL, **chat).choices == ask(client, True).choices
    text = {"echo": False, "suffix": None, "best_of": 1, "logprobs": None}
    assert ask(client, False, **NEUTRAL, **text).choices == ask(client, False).choices


BOTH = [
    ("presence_penalty", 1), ("frequency_penalty", -0.5), ("logit_bias", {"5": 1}), ("temperature", -1),
    ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("n", 0), ("n", 129), ("n", True),
    ("max_tokens", 0), ("max_tokens", 1.5), ("seed", 2**63), ("stop", ""), ("stop", ["a", None]), ("stop", 3),
    ("stream", "yes"), ("stream_options", {"other": True}), ("no_such_parameter", 1),
    ("reasoning_effort", "low"),
]  # fmt: skip
CHAT = [
    ("tools", [{"type": "function"}]), ("response_format", {"type": "json_object"}),
    ("tool_choice", "required"), ("top_logprobs", 2), ("logprobs", 1), ("messages", []),
    ("messages", "hello"),
    ("modalities", ["audio"]),
    ("messages[0].content", [{"role": "user", "content": 3}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages[0].role", [{"role": "tool", "content": "a"}]),
    ("messages[1].name", [*QUESTION, {"role": "user", "content": "a", "name": "b"}]),
    ("messages", [{"role": "user", "content": "x" * 500}]),
]  # fmt: skip
TEXT = [
    ("echo", True), ("suffix", "end"), ("best_of", 2), ("logprobs", 1), ("prompt", ""), ("prompt", []),
    ("prompt", [[]]), ("prompt", ["a", ""]), ("prompt", [10**6]), ("prompt", [-1]), ("prompt", [1.5]),
    ("prompt", ["a", 1]), ("prompt", "x" * 500), ("prompt", None), ("n", 128),
]  # fmt: skip
WRONG = [(True, *row) for row in BOTH + CHAT] + [(False, *row) for row in BOTH + TEXT]


@pytest.mark.parametrize(("chat", "param", "value"), WRONG)
def test_a_wrong_request_is_a_400_that_names_the_parameter(client, chat, param, value):
    body = {param.partition("[")[0]: value}
    if value == 128:
        body["prompt"] = ["a"] * 17
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, chat, extra_body=body)
    error = caught.value.body
    assert error["param"] == param and param in error["message"] and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON"), (b"", "JSON"), (b"\xff\xfe{}", "JSON"), (b"[]", "object"), (b"3", "object"),
        (b"[" * 100_000, "JSON"), (b'{"prompt": "\\ud800"}', "JSON"), (b"9" * 5000, ""),
        (b'{"prompt": "a", "temperature": 1e-300}', "temperature"), (b"{}", "prompt: field required"),
        *[(b'{"prompt": "a", "%s": %s}' % (name, number), name.decode())
          for name in (b"temperature", b"top_p", b"seed", b"max_tokens", b"presence_penalty", b"prompt")
          for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999")],
    ],
)  # fmt: skip
def test_what_is_no_request_is_a_400(client, body, says):
    response = client._client.post("completions", content=body, headers=client.auth_headers)
    assert response.status_code == 400 and says in response.json()["error"]["message"]


def test_other_errors_have_the_same_shape(client, url):
    assert [m.id for m in client.models.list()] == ["m"] and client.models.retrieve("m").id == "m"
    for wrong in (lambda: client.models.retrieve("other/model"), lambda: ask(client, True, model="gpt-5")):
        with pytest.raises(openai.NotFoundError) as caught:
            wrong()
        assert caught.value.body["code"] == "model_not_found" and "there is m" in caught.value.body["message"]
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model="m", input="a")
    for key in ("Secret", "secre", "secret2", "ß"):
        headers = {"authorization": f"Bearer {key}".encode()}
        for method, path in (("GET", "models"), ("POST", "completions")):
            response = client._client.request(method, path, headers=headers, json={"prompt": "a"})
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert "secret" not in response.text
    wrong = client._client.get("completions", headers=client.auth_headers)
    assert wrong.status_code == 405 and wrong.json()["error"]["type"] == "invalid_request_error"
    assert client._client.get(f"{url}/health").json() == {}


def test_200_requests_at_once_are_all_answered_as_if_alone(client):
    want = [ask(client, False, temperature=1, seed=s, max_tokens=9).choices for s in range(4)]
    with ThreadPoolExecutor(200) as threads:
        together = threading.Barrier(200)

        def one(number: int) -> Any:
            together.wait()
            if number % 2:
                chunks = ask(client, False, temperature=1, seed=number % 4, max_tokens=9, stream=True)
                return "".join(chunk.choices[0].text for chunk in chunks)
            return ask(client, False, temperature=1, seed=number % 4, max_tokens=9).choices[0].text

        got = list(threads.map(one, range(200)))
    assert got == [want[number % 4][0].text for number in range(200)]
