"""Rejection sampling: the engine is the settings', and an engine that dies costs no step that was done."""

from __future__ import annotations

import json

import pytest

from pipeline.__main__ import main
from pipeline.data.corpus import Row, read_corpus
from pipeline.stages import reject
from rollout.engine import EngineDied
from rollout.types import Rollout
from tests.small import random_policy


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1", initializer_range=0.1)


class Solver:
    """An engine that solves every second sample; it dies at request `dies_at`."""

    def __init__(self, tokenizer, dies_at=0):
        self.tokenizer, self.dies_at, self.requests = tokenizer, dies_at, 0

    def generate(self, prompts, sampling):
        self.requests += 1
        if self.requests == self.dies_at:
            raise EngineDied("the engine is gone.")
        for i, prompt in enumerate(prompts):
            for s in range(sampling.n):
                answer = prompt.problem.answer if s % 2 else "no"
                text = f"So {sampling.seed + s}.\n</think>\n<answer>{answer}</answer>"
                ids = (*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id)
                yield Rollout(prompt, i, s, ids, (0.0,) * len(ids), "stop")

    def rest(self):
        return False

    def drain(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def run(policy, tokenizer, tmp_path, monkeypatch):
    """`run(name, *flags, dies_at=0)`: the exit code of four steps of the stage."""

    def start(name, *flags, dies_at=0):
        opened = []
        monkeypatch.setattr(
            reject,
            "open_rollouts",
            lambda policy, tokenizer, settings, path: opened.append(settings) or Solver(tokenizer, dies_at),
        )
        line = ["reject", "--config", "configs/micro/reject.toml", "--runs", tmp_path, "--name", name]
        line += ["--init-from", policy, "--pool", 12, "--prompts-per-step", 3, "--threads", 1, *flags]
        code = main(list(map(str, line)))
        assert not opened or opened[0].local.max_batch == (5 if "--rollout.local.max-batch" in flags else 0)
        return code

    return start


def test_an_engine_that_dies_costs_no_step_and_the_resumed_corpus_is_the_same(run, tmp_path, capsys):
    assert run("whole", "--rollout.local.max-batch", 5) == 0
    assert run("killed", dies_at=3) == 2
    said = capsys.readouterr().err
    assert "the engine is gone. To go on from the last step:" in said and "--resume" in said
    assert run("killed", "--resume") == 0
    whole, again = ((tmp_path / name / "reject") for name in ("whole", "killed"))
    assert (whole / "corpus.jsonl").read_bytes() == (again / "corpus.jsonl").read_bytes()
    rows = read_corpus(whole / "corpus.jsonl")
    assert sum(row.source.startswith("reject:") for row in rows) == 12 * 2
    for name in ("metrics.jsonl", "samples.jsonl"):
        first, second = (
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
                for line in (folder / name).read_text().splitlines()
            ]
            for folder in (whole, again)
        )
        assert first == second


def test_a_policy_that_solves_nothing_is_an_error_that_says_so(policy, tmp_path, capsys):
    line = ["reject", "--config", "configs/micro/reject.toml", "--runs", tmp_path, "--init-from", policy]
    line += ["--pool", 4, "--samples", 2, "--threads", 1, "--max-tokens", 8]
    assert main(list(map(str, line))) == 2
    assert "reject kept nothing of 4 problems" in capsys.readouterr().err


def test_workers_sample_what_one_engine_does(policy, tmp_path, monkeypatch):
    """Through the real engines: the same completions from two processes as in this one."""
    kept = Row("a", "1+1?", "<think>1+1=2</think><answer>2</answer>", "2", "en", "math", "made")
    monkeypatch.setattr(reject, "keepers", lambda group, least: [kept])
    texts = {}
    for name, workers in (("one", 0), ("pool", 2)):
        line = [
            "reject",
            "--config",
            "configs/micro/reject.toml",
            "--runs",
            tmp_path,
            "--name",
            name,
            "--pool",
            8,
        ]
        line += ["--init-from", policy, "--threads", 1, "--max-tokens", 12, "--rollout.workers", workers]
        assert main(list(map(str, line))) == 0
        logged = (tmp_path / name / "reject/samples.jsonl").read_text().splitlines()
        texts[name] = [(row["id"], row["text"], row["tokens"]) for row in map(json.loads, logged)]
    assert texts["pool"] == texts["one"] and len({text for _, text, _ in texts["one"]}) > 10
