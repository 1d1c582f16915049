"""Supervised fine-tuning: rows that are too long for the settings or the model."""

import json
import weakref

import pytest

from pipeline.__main__ import main
from pipeline.stages import sft as stage
from tests.small import random_policy


@pytest.fixture
def sft(tokenizer, tmp_path, root, capsys):
    """`sft(*flags)` on two rows of about 50 and 90 tokens, a model of 64 positions: exit code and errors."""
    policy = random_policy(tmp_path / "policy", tokenizer, "r1", max_position_embeddings=64)
    rows = [
        {
            "id": name,
            "question": "3+4=?",
            "completion": f"<think>\n{'3+4=7 ' * n}</think> <answer> 7 </answer>",
        }
        for name, n in (("short", 2), ("long", 12))
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))

    def run(*flags):
        code = main(
            [
                "sft", "--config", f"{root}/configs/micro/sft.toml", "--runs", str(tmp_path / "runs"),
                "--init-from", str(policy), "--corpus", str(corpus), "--samples-from=", "--curated=0",
                "--threads=1", *flags,
            ]
        )  # fmt: skip
        return code, capsys.readouterr()

    return run


def test_a_row_beyond_the_positions_of_the_model_is_left_out(sft):
    code, said = sft("--max-length=128")
    assert code == 0 and "1 of 2 rows exceed the model's context of 64 tokens: left out" in said.out


def test_training_on_no_row_is_refused_and_leaves_nothing(sft, tmp_path):
    code, said = sft("--max-length=8")
    assert code == 2 and "exceed max_length=8; raise it, or take shorter rows" in said.err
    assert not list((tmp_path / "runs").iterdir())


def test_a_row_that_does_not_fit_the_template_is_refused_by_name(sft, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "bare", "question": "3+4=?", "completion": "7"}))
    code, said = sft(f"--corpus={other}")
    assert code == 2 and "the row 'bare': does not fit template r1: template" in said.err
    assert said.err.count("\n") == 1 and not list((tmp_path / "runs").iterdir())


def test_a_row_that_is_too_long_is_left_out(sft):
    code, said = sft("--max-length=64")
    assert code == 0 and "1 of 2 rows exceed max_length=64: left out" in said.out


def test_batches_are_packed_one_at_a_time(sft, monkeypatch):
    """All of them would hold weights of 4 bytes a token and epoch."""
    alive, most, made = [], [], stage.pack_supervised

    def watched(*args):
        batch = made(*args)
        part = batch.parts[0]
        alive.append(weakref.ref(part[0].weights))
        most.append(sum(ref() is not None for ref in alive))
        return batch

    monkeypatch.setattr(stage, "pack_supervised", watched)
    code, _ = sft("--max-length=64", "--epochs=9")
    assert code == 0 and len(alive) == 18 and max(most) <= 2
