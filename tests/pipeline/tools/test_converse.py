"""What `chat` and `serve` share: pieces make the whole, thinking comes apart; the conversation of `chat`."""

from __future__ import annotations

import io
import json
import shutil
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


def test_pieces_are_the_whole_completion(talk):
    ids = tuple(talk.tokenizer.encode("User: 3+4=?"))
    (whole,) = talk.engine.generate([Prompt(Problem("p", "general", ""), "raw", ids)], GREEDY)
    got = list(pieces(talk.engine, ids, GREEDY, room=100))
    assert [t for part, *_ in got for t in part] == list(whole.token_ids)
    assert [p for _, part, _ in got for p in part] == pytest.approx(list(whole.logprobs), abs=1e-5)
    assert [over for *_, over in got[:-1]] == [""] * (len(got) - 1) and got[-1][2] == whole.finish_reason
    assert len([t for part, *_ in pieces(talk.engine, ids, GREEDY, room=11) for t in part]) <= 11
    sampled = replace(GREEDY, temperature=1.0, seed=1)
    again, other, later = sampled, replace(sampled, seed=2), replace(sampled, first_index=1 << 20)
    first, same, *others = [[t for part, *_ in pieces(talk.engine, ids, s, 100) for t in part]
                            for s in (sampled, again, other, later)]  # fmt: skip
    assert first == same and first not in others and others[0] != others[1]


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


def test_tokens_after_a_stop_string_do_not_count(talk):
    ids = tuple(talk.tokenizer.encode("User: 3+4=?"))
    whole = list(talk.stream(ids, None, GREEDY))
    text = "".join(text for piece in whole for _, text in piece.texts)
    stop = text[len(text) // 2 :][:3]
    cut = list(talk.stream(ids, None, GREEDY, ["never said", stop]))
    assert "".join(text for piece in cut for _, text in piece.texts) == text[: text.index(stop)]
    got = [i for piece in cut for i in piece.token_ids]
    assert len(got) == sum(len(piece.logprobs) for piece in cut) and cut[-1].finish_reason == "stop"
    assert stop in talk.tokenizer.decode(got) and stop not in talk.tokenizer.decode(got[:-1])


def test_text_that_is_not_split_keeps_its_tags(talk, monkeypatch):
    ids = talk.tokenizer.encode("<think>a</think>b")
    monkeypatch.setattr(converse, "pieces", lambda *a: iter([(ids, [0.0] * len(ids), "length")]))
    assert [p.texts for p in talk.stream([3], None, GREEDY)] == [[("answer", "<think>a</think>b")]]
    assert [p.texts for p in talk.stream([3], False, GREEDY)] == [[("thinking", "a"), ("answer", "b")]]


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
