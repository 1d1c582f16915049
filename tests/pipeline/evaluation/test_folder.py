"""The folder: the same bytes twice, killed at any moment, and by any number of workers; what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time

import pytest

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.folder import Folder
from pipeline.settings.evaluate import EvaluateSettings

FILES = ("inputs.json", "generations.jsonl", "scores.json")


@pytest.fixture
def real(checkpoint, tmp_path):
    """`real(out, **changes)`: an evaluation of a real model in 6 parts of 2 questions, 2 samples each."""

    def config(out, **changes):
        return EvaluateSettings(**{
            "model": checkpoint, "benchmark": "generator:sum", "limit": 12, "samples": 2, "save_every": 4,
            "max_tokens": 30, "threads": 1, "out": tmp_path / out, **changes,
        })  # fmt: skip

    return config


def bytes_of(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


def test_twice_and_killed_ten_times_gives_the_same_bytes(real, tmp_path):
    began = time.monotonic()
    evaluate(real("whole"))
    whole, seconds = bytes_of(tmp_path / "whole"), time.monotonic() - began
    evaluate(real("again"))
    assert bytes_of(tmp_path / "again") == whole
    rng, sizes = random.Random(1), set()
    rows = tmp_path / "killed/generations.jsonl"
    for _ in range(10):
        child = os.fork()
        if child == 0:
            evaluate(real("killed"))
            os._exit(0)
        time.sleep(rng.uniform(seconds / 4, 3 * seconds / 4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sizes.add(rows.stat().st_size if rows.exists() else 0)
    assert len(sizes) > 2, "it was killed in the middle"
    evaluate(real("killed"))
    assert bytes_of(tmp_path / "killed") == whole
    assert len(whole["generations.jsonl"].splitlines()) == 24


def test_workers_give_the_bytes_of_one_engine(real, tmp_path):
    """A part goes to one worker as a whole, whatever their number; by hand also with 1 and with 4."""
    evaluate(real("none"))
    evaluate(real("pool", workers=2))
    assert bytes_of(tmp_path / "pool") == bytes_of(tmp_path / "none")


# ---- with a scripted engine: parts of the questions (a, b) and (c, long, code), two samples each


@pytest.fixture
def config(stub, sums, tmp_path):
    return {
        "model": stub(template="r1-zero-short"), "benchmark": str(sums), "out": tmp_path / "out",
        "samples": 2, "max_tokens": 40, "temperature": 0.0, "top_p": 1.0, "save_every": 4,
    }  # fmt: skip


def says(question, sample):
    return "The answer is 4." if sample == 0 else "5"


def go(config, **changes):
    return evaluate(EvaluateSettings(**config | changes))


@pytest.fixture
def whole(config, scripted):
    """The three files of an evaluation that nothing disturbed."""
    scripted(says)
    go(config, out=config["out"].with_name("whole"))
    return bytes_of(config["out"].with_name("whole"))


def asked(engine):
    return [([p.problem.id for p in prompts], sampling.first_index) for prompts, sampling in engine.calls]


def test_the_folder_grows_part_by_part(config, scripted, whole):
    engines, seen = scripted(says), []
    folder = config["out"]

    def pause():
        lines = (folder / "generations.jsonl").read_text().splitlines()
        seen.append((len(lines), (folder / "scores.json").exists(), (folder / "inputs.json").exists()))

    evaluate(EvaluateSettings(**config), pause=pause)
    assert seen == [(4, False, True), (10, False, True)]
    assert asked(engines[0]) == [(["a", "b"], 0), (["c", "code"], 2)]
    assert bytes_of(folder) == whole


def test_a_pool_gets_all_parts_at_once_and_their_size(config, scripted, whole):
    engines = scripted(says)
    go(config, workers=3, threads=1)
    assert engines[0].pool == (3, 1, 2) and asked(engines[0]) == [(["a", "b", "c", "code"], 0)]
    rows = (config["out"] / "generations.jsonl").read_bytes()
    assert rows == whole["generations.jsonl"], "whatever the order they come back in"


@pytest.mark.parametrize("cut", [0, 1, 300, -40, -1, None], ids=str)
def test_whatever_was_written_goes_on(config, scripted, whole, cut):
    """Cut anywhere, also in the middle of a row: what is complete stays, the rest is sampled again."""
    folder = config["out"]
    folder.mkdir()
    data = whole["generations.jsonl"]
    (folder / "inputs.json").write_bytes(whole["inputs.json"])
    (folder / "generations.jsonl").write_bytes(data[:cut])
    engines = scripted(says)
    go(config)
    assert bytes_of(folder) == whole
    kept = data[:cut].count(b"\n")
    assert asked(engines[0]) == [(["a", "b"], 0), (["c", "code"], 2)][(kept >= 4) + (kept == 10) :]


def test_rows_of_another_order_are_sampled_again(config, scripted, whole):
    folder = config["out"]
    folder.mkdir()
    (folder / "inputs.json").write_bytes(whole["inputs.json"])
    lines = whole["generations.jsonl"].splitlines(keepends=True)
    (folder / "generations.jsonl").write_bytes(b"".join(lines[2:3] + lines[1:]))
    scripted(says)
    go(config)
    assert bytes_of(folder) == whole


def test_only_the_first_lines_of_a_folder_are_not_taken_for_another_s(config, scripted, whole):
    """Killed between the first file and the record: it begins again."""
    config["out"].mkdir()
    (config["out"] / "generations.jsonl").touch()
    (config["out"] / "inputs.json.partial").write_text("{")
    scripted(says)
    go(config)
    (config["out"] / "inputs.json.partial").unlink(missing_ok=True)
    assert bytes_of(config["out"]) == whole


class Filling:
    """A file on a disk with `room` bytes left."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_disk_that_fills_loses_nothing(config, scripted, whole, monkeypatch):
    record = Folder.record

    def filling(self, *args):
        record(self, *args)
        self.file = Filling(self.file, len(whole["generations.jsonl"]) - 100)

    scripted(says)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "record", filling)
        with pytest.raises(UserError, match=r"disk is full: 4 of 10 completions are kept in .*out"):
            go(config)
    lines = (config["out"] / "generations.jsonl").read_bytes()
    assert lines.count(b"\n") == 4 and lines.endswith(b"\n")
    go(config)
    assert bytes_of(config["out"]) == whole


@pytest.mark.parametrize("name", ["inputs.json", "scores.json"])
def test_a_disk_that_is_full_at_the_ends(config, scripted, whole, monkeypatch, name):
    def full(path, text):
        if path.name == name:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        path.write_text(text)

    scripted(says)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.evaluation.folder.write_atomic", full)
        with pytest.raises(UserError, match="disk is full"):
            go(config)
    go(config)
    assert bytes_of(config["out"]) == whole


def test_ctrl_c_says_what_is_kept(config, scripted, whole, capsys):
    def interrupted(question, sample):
        if question.startswith("3+3"):
            raise KeyboardInterrupt
        return says(question, sample)

    scripted(interrupted)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in config.items()]
    assert main(["evaluate", *flags]) == 130
    assert "4 of 10 completions are kept in" in capsys.readouterr().err
    scripted(says)
    assert main(["evaluate", *flags]) == 0
    said = capsys.readouterr()
    assert "going on after 4 of 10" in said.out
    assert "; 1 prompts are longer than the context and count as wrong" in said.err
    assert bytes_of(config["out"]) == whole


def test_one_process_at_a_time(config, scripted):
    scripted(says)

    def second():
        with pytest.raises(UserError, match="another process is working in"):
            go(config)

    evaluate(EvaluateSettings(**config), pause=second)


@pytest.mark.parametrize("finished", [True, False])
def test_what_changed_since_is_named(config, scripted, sums, finished):
    def stop():
        raise KeyboardInterrupt

    scripted(says)
    if finished:
        go(config)
    else:
        with pytest.raises(KeyboardInterrupt):
            evaluate(EvaluateSettings(**config), pause=stop)
    before = {path.name: path.read_bytes() for path in config["out"].iterdir()}
    for change, words in {
        "samples": (3, "2 samples a problem, from which there is no avg@3; take another --out"),
        "save_every": (5, "save_every 4, not 5"),
        "top_k": (3, "top_k 0, not 3"),
        "seed": (7, "seed 0, not 7"),
    }.items():
        with pytest.raises(UserError, match=words[1]):
            go(config, **{change: words[0]})
    (config["model"] / "weights").write_text("new")
    with pytest.raises(UserError, match=r"model_sha256 .*: the model changed since; restore them"):
        go(config)
    (config["model"] / "weights").unlink()
    sums.write_text(sums.read_text().replace('"4"', '"5"'))
    with pytest.raises(UserError, match=r"problems_sha256 .*: the problems of .*sums.jsonl changed since"):
        go(config)
    assert {path.name: path.read_bytes() for path in config["out"].iterdir()} == before


DAMAGE = [
    "",
    "{",
    "[]",
    "null",
    '{"inputs": 3}',
    '{"inputs": {}}',
    '{"inputs": {"samples": "x"}}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("text", DAMAGE, ids=repr)
@pytest.mark.parametrize("name", ["inputs.json", "scores.json"])
def test_damaged_records_are_named_or_made_again(config, scripted, whole, capsys, name, text):
    scripted(says)
    go(config)
    (config["out"] / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in config.items()]
    if main(["evaluate", *flags]) == 0:
        assert name == "scores.json" and bytes_of(config["out"]) == whole
    else:
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(config["out"]) in error and error.startswith("error: ")


def test_prompts_that_changed_are_refused(config, scripted, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    scripted(says)
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluateSettings(**config), pause=stop)
    monkeypatch.setattr("pipeline.evaluation.evaluate.template_hash", lambda *args: "other")
    with pytest.raises(UserError, match=r"template_hash .*the templates changed since"):
        go(config)


def test_other_code_goes_on_and_is_recorded(config, scripted, monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    scripted(says)
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluateSettings(**config), pause=stop)
    monkeypatch.setattr("pipeline.evaluation.evaluate.environment", lambda: dict.fromkeys(
        ("commit", "python", "packages", "machine"), "new"))  # fmt: skip
    got = go(config)
    assert [made["commit"] == "new" for made in got["made_with"]] == [False, True]
    assert "going on with another commit, python, packages, machine" in capsys.readouterr().out


def test_inputs_hold_all_that_is_needed(config, whole):
    record = json.loads(whole["inputs.json"])
    inputs = record["inputs"]
    assert {"seed", "template", "model_sha256", "problems_sha256", "temperature", "save_every"} <= set(inputs)
    assert list(record["templates"]) == ["r1-zero-short"]
    assert {"commit", "code_sha256", "packages", "threads"} <= set(record["made_with"][0])
    assert json.loads(whole["scores.json"])["inputs"] == inputs
    row = json.loads(whole["generations.jsonl"].splitlines()[-1])
    assert row["tests"] == ["assert f() == 2"] and row["prompt"] == "User: f is 2\nAssistant:"
