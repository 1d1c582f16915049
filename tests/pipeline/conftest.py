"""A checkpoint with random weights, and an engine that says what a test tells it to."""

from __future__ import annotations

import json

import pytest

from rollout.types import Rollout
from tests.small import random_policy


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory):
    """A tiny native model of 96 positions that was trained, it says, with the template r1-zero-short."""
    path = tmp_path_factory.mktemp("made") / "model"
    return random_policy(path, tokenizer, "r1-zero-short", max_position_embeddings=96)


class Scripted:
    """Answers question q, sample s with `says(q, s)`; yields in reverse, as an engine may."""

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says, self.calls, self.closed, self.max_batch = tokenizer, says, [], False, None

    def generate(self, prompts, sampling):
        self.calls.append((list(prompts), sampling))
        for index, prompt in reversed(list(enumerate(prompts))):
            for sample in range(sampling.n):
                text = self.says(prompt.problem.question, sample)
                ids = (*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id)
                cut = len(ids) > sampling.max_tokens
                ids = ids[: sampling.max_tokens]
                yield Rollout(prompt, index, sample, ids, (0.0,) * len(ids), "length" if cut else "stop")

    def close(self):
        self.closed = True


@pytest.fixture
def scripted(tokenizer, monkeypatch):
    """`scripted(says)` makes every model that is opened from now on say that; gives the list of engines."""

    def install(says):
        engines = []

        def open_engine(path, engine, dtype, device, vllm, local, workers, threads, task_prompts):
            engines.append(Scripted(tokenizer, says))
            engines[-1].max_batch, engines[-1].pool = local.max_batch, (workers, threads, task_prompts)
            return engines[-1], tokenizer

        monkeypatch.setattr("pipeline.tools.open.open_engine", open_engine)
        return engines

    return install


@pytest.fixture
def stub(tmp_path):
    """`stub(name, **pipeline_json)`: a directory that passes for a model of 128 positions."""

    def make(where="m", **about):
        path = tmp_path / where
        path.mkdir(parents=True)
        (path / "config.json").write_text('{"max_position_embeddings": 128, "model_type": "deepseek_v3"}')
        if about:
            (path / "pipeline.json").write_text(json.dumps(about))
        return path

    return make


@pytest.fixture
def sums(tmp_path):
    """Three sums, an overlong question, and a program to write, as a file."""
    rows = [
        {"id": "a", "problem": "1+1?", "answer": "2"},
        {"id": "b", "problem": "2+2?", "answer": "4"},
        {"id": "c", "problem": "3+3?", "answer": "6"},
        {"id": "long", "problem": "1+" * 80 + "1?", "answer": "81"},
        {"id": "code", "problem": "f is 2", "kind": "code", "tests": ["assert f() == 2"]},
    ]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
