"""`chat` and `serve`: pieces make the whole, thinking comes apart, wrong requests get a clear 400."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import threading
import time
from dataclasses import replace

import pytest

from pipeline.errors import UserError
from pipeline.settings.tools import ChatSettings, ServeSettings
from pipeline.tools import conversation as converse
from pipeline.tools import serve
from pipeline.tools.chat import main as run_chat
from pipeline.tools.conversation import Conversation
from rollout.checkpoint import context_and_vocabulary
from rollout.text.stream import Decoder, ThinkingSplit, pieces
from rollout.types import Problem, Prompt, SamplingParams
from tests.small import random_policy

GREEDY = SamplingParams(max_tokens=30, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    return random_policy(path, tokenizer, "r1", initializer_range=0.2, max_position_embeddings=128)


@pytest.fixture(scope="module")
def talk(folder):
    opened = Conversation(ServeSettings(model=folder, threads=1))
    yield opened
    opened.engine.close()


@pytest.fixture(scope="module")
def post(folder, talk):
    """POST a body: status and JSON, or the events of a stream."""
    config = ServeSettings(model=folder, port=0, name="m")
    server = serve.make_server(config, talk)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path, body, raw=False):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, body if raw else json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
        if response.headers["Content-Type"] == "text/event-stream":
            return response.status, [line[6:] for line in text.split("\n\n") if line]
        return response.status, json.loads(text)

    yield ask
    server.shutdown()
    server.server_close()


def test_pieces_are_the_whole_completion(talk):
    ids = tuple(talk.tokenizer.encode("User: 3+4=?"))
    (whole,) = talk.engine.generate([Prompt(Problem("p", "general", ""), "raw", ids)], GREEDY)
    got = list(pieces(talk.engine, ids, GREEDY, room=100))
    assert [t for part, _ in got for t in part] == list(whole.token_ids)
    assert [over for _, over in got[:-1]] == [""] * (len(got) - 1) and got[-1][1] == whole.finish_reason
    assert len([t for part, _ in pieces(talk.engine, ids, GREEDY, room=11) for t in part]) <= 11
    sampled = replace(GREEDY, temperature=1.0, seed=1)
    ids_by_seed = [[t for part, _ in pieces(talk.engine, ids, s, 100) for t in part]
             for s in (sampled, sampled, replace(sampled, seed=2))]  # fmt: skip
    assert ids_by_seed[0] == ids_by_seed[1] != ids_by_seed[2]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
@pytest.mark.parametrize(
    ("opened", "text", "want"),
    [
        (True, "a < b</think>\n2 <answer>", ("a < b", "\n2 <answer>")),
        (False, "<think>\nhm</think>two <think> more", ("\nhm", "two <think> more")),
        (False, "plain </thin", ("", "plain </thin")),
        (True, "never closed </thi", ("never closed </thi", "")),
    ],
)
def test_thinking_and_answer_come_apart(opened, text, want, size):
    split, got = ThinkingSplit(opened), {"thinking": "", "answer": ""}
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    for i, part in enumerate(parts):
        for kind, new in split.add(part, over=i == len(parts) - 1):
            assert new
            got[kind] += new
    assert (got["thinking"], got["answer"]) == want


def test_text_comes_in_whole_characters_and_ends_at_a_stop_string(talk):
    ids = talk.tokenizer.encode("a 龘 b##c")
    decoder = Decoder(talk.tokenizer)
    got = [decoder.add([i], over=i == ids[-1]) for i in ids]
    assert "".join(got) == "a 龘 b##c" and not any("\ufffd" in text for text in got)
    decoder = Decoder(talk.tokenizer, ["##"])
    assert "".join(decoder.add([i]) for i in ids) == "a 龘 b" and decoder.stopped


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_the_whole_in_pieces(post, path):
    chat = path == "/v1/chat/completions"
    body = {"model": "m", "temperature": 0, "max_tokens": 20}
    body |= {"messages": [{"role": "user", "content": "3+4=?"}]} if chat else {"prompt": "User: 3+4=?"}
    status, whole = post(path, body)
    choice = whole["choices"][0]
    assert status == 200 and whole["model"] == "m" and choice["finish_reason"] in ("stop", "length")
    assert whole["usage"]["completion_tokens"] <= 20
    assert whole["usage"]["total_tokens"] == sum(list(whole["usage"].values())[:2])
    status, events = post(path, body | {"stream": True})
    assert status == 200 and events[-1] == "[DONE]" and len(events) > 3
    made = serve.join_chunks([json.loads(event) for event in events[:-1]], chat)["choices"][0]
    assert made == choice
    if chat:  # the prompt opened the think tag, and a random model does not close it
        assert choice["message"]["reasoning_content"]


def test_requests_at_once_do_not_disturb_each_other(post):
    body = {"prompt": "User: 3+4=?", "temperature": 1, "max_tokens": 30}
    want = [post("/v1/completions", body | {"seed": s})[1]["choices"] for s in range(3)]
    got = [None] * 3

    def ask(s):
        got[s] = post("/v1/completions", body | {"seed": s})[1]["choices"]

    threads = [threading.Thread(target=ask, args=(s,)) for s in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_the_engine_is_never_asked_twice_at_once(talk, monkeypatch):
    """Its streams would share one model's modules, and vLLM's engine is not made for it."""
    at_work, most = [0], [0]

    def slow(engine, ids, sampling, room):
        for _ in range(5):
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
            time.sleep(0.005)
            at_work[0] -= 1
            yield [5], ""
        yield [6], "length"

    monkeypatch.setattr(converse, "pieces", slow)
    ask = lambda: list(talk.stream([3], False, GREEDY, converse.Reply(1)))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_stop_string_ends_the_text_before_it(post):
    body = {"prompt": "User: 3+4=?", "temperature": 0, "max_tokens": 30}
    text = post("/v1/completions", body)[1]["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    choice = post("/v1/completions", body | {"stop": ["never said", stop]})[1]["choices"][0]
    assert stop and choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/completions", {"prompt": ""}, "not empty"),
        ("/v1/completions", {"prompt": [10**6]}, "outside the model's vocabulary"),
        ("/v1/completions", {"prompt": "x" * 500}, "context holds 128"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "many"}, "many"),
        ("/v1/completions", {"prompt": "a", "n": 2}, "n must be 1"),
        ("/v1/completions", {"prompt": "a", "stop": 3}, "stop must be"),
        ("/v1/completions", {"prompt": "a", "stop": ["b", None]}, "stop must be"),
        ("/v1/chat/completions", {"messages": []}, "messages must be"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages must be"),
        ("/v1/chat/completions", [], "not a JSON object"),
    ],
)
def test_a_wrong_request_is_a_clear_400(post, path, body, says):
    status, answer = post(path, body)
    assert status == 400 and says in answer["error"]["message"]


def test_other_paths_and_no_json(post):
    assert post("/v1/models", None)[1]["data"][0]["id"] == "m" and post("/health", None)[0] == 200
    assert post("/v1/nothing", {})[0] == 404 and post("/v1/nothing", None)[0] == 404
    assert post("/v1/completions", "{", raw=True)[0] == 400


def test_chat_answers_each_line_and_starts_over(folder, monkeypatch, capsys):
    chat(folder, monkeypatch, "3+4=?\n/new\n3+4=?\n", temperature=0.0)
    out = capsys.readouterr().out
    half = out[: len(out) // 2]
    assert half and out == half * 2 and "\033" not in out  # greedy, same question, no history: same answer


def chat(folder, monkeypatch, said, **settings):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    run_chat(ChatSettings(model=folder, max_tokens=12, threads=1, **settings))


def test_chat_remembers_the_conversation_until_it_starts_over(folder, monkeypatch, capsys):
    seen = []
    prompt = Conversation.prompt
    monkeypatch.setattr(
        Conversation, "prompt", lambda self, messages: seen.append(list(messages)) or prompt(self, messages)
    )
    chat(folder, monkeypatch, "one\ntwo\n/new\nthree\n", temperature=0.0)
    assert [[m["role"] for m in messages] for messages in seen] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert [messages[-1]["content"] for messages in seen] == ["one", "two", "three"]


def test_each_turn_has_numbers_of_its_own_and_each_run_the_same(folder, monkeypatch, capsys):
    outputs = []
    for _ in range(2):
        chat(folder, monkeypatch, "3+4=?\n/new\n3+4=?\n", temperature=1.0, top_p=1.0, seed=5)
        outputs.append(capsys.readouterr().out)
    first, second = outputs
    assert first == second and first[: len(first) // 2] != first[len(first) // 2 :]


def test_a_model_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint directory"):
        run_chat(ChatSettings(model=tmp_path / "none"))
    with pytest.raises(UserError, match="no model at"):
        serve.main(ServeSettings(model=tmp_path / "none"))


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("tokenizer.json", "has no tokenizer.json"),
        ("max_position_embeddings", "lacks max_position_embeddings"),
    ],
)
def test_what_a_model_lacks_is_a_user_error(folder, tmp_path, without, says):
    path = shutil.copytree(folder, tmp_path / "lacking")
    if (path / without).is_file():
        (path / without).unlink()
    else:
        config = json.loads((path / "config.json").read_text())
        del config[without]
        (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        Conversation(ChatSettings(model=path))


def test_the_context_has_several_names(tmp_path):
    (tmp_path / "config.json").write_text('{"n_positions": 32, "vocab_size": 5}')  # GPT-2
    assert context_and_vocabulary(tmp_path, 0) == (32, 5)
    assert context_and_vocabulary(tmp_path, 20) == (20, 5)
