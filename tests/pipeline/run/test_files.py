"""Files and folders that are replaced: complete or not at all, on disk before they have their name."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from pipeline.run.files import replacing, sha256, write_atomic


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text(text)


@pytest.mark.parametrize("content", ["new\n", ["ne", "w\n"], (part for part in ("new", "\n"))])
def test_a_file_is_replaced_by_text_or_lines(tmp_path, content):
    file = tmp_path / "a.txt"
    file.write_text("old")
    write_atomic(file, content)
    assert file.read_text() == "new\n" and names(tmp_path) == {"a.txt"}


def test_a_folder_is_replaced(tmp_path):
    for text in ("old", "new"):
        with replacing(tmp_path / "model") as partial:
            fill(partial, text)
    assert (tmp_path / "model/inner/a.txt").read_text() == "new" and names(tmp_path) == {"model"}


def broken_lines(error):
    yield "half"
    raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a defect"), Killed()])
def test_what_fails_leaves_the_old_and_a_retry_succeeds(tmp_path, error):
    write_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "a.txt", broken_lines(error))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"a.txt"} | ({"a.txt.partial"} if isinstance(error, Killed) else set())
    with replacing(tmp_path / "model") as partial:
        fill(partial, "old")
    with pytest.raises(type(error)), replacing(tmp_path / "model") as partial:
        fill(partial, "half")
        raise error
    assert (tmp_path / "model/inner/a.txt").read_text() == "old"
    with replacing(tmp_path / "model") as partial:
        fill(partial, "new")
    write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "model/inner/a.txt").read_text() == "new" and names(tmp_path) == {"a.txt", "model"}


@pytest.mark.parametrize("at", ["rename", "replace"])
def test_a_folder_is_never_lost_between_its_two_renames(tmp_path, monkeypatch, at):
    with replacing(tmp_path / "model") as partial:
        fill(partial, "old")
    monkeypatch.setattr(Path, at, lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed), replacing(tmp_path / "model") as partial:
        fill(partial, "new")
    monkeypatch.undo()
    texts = {path.read_text() for path in tmp_path.glob("model*/inner/a.txt")}
    assert texts == {"old", "new"}
    with replacing(tmp_path / "model") as partial:
        fill(partial, "newer")
    assert names(tmp_path) == {"model"} and (tmp_path / "model/inner/a.txt").read_text() == "newer"


@pytest.mark.parametrize(
    ("error", "free", "full"),
    [
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 4096, True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 1 << 30, False),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1 << 30, True),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), 1 << 30, True),
        (ValueError("lr"), 1 << 30, False),
    ],
)  # fmt: skip
def test_a_disk_that_fills_under_a_library_is_an_error_of_the_disk(tmp_path, monkeypatch, error, free, full):
    usage = lambda folder: SimpleNamespace(free=free if (folder / "a.partial").exists() else 1 << 30)  # noqa: E731
    monkeypatch.setattr("pipeline.run.files.shutil.disk_usage", usage)
    with pytest.raises(OSError if full else type(error)) as raised, replacing(tmp_path / "a") as partial:
        partial.write_text("half of it")
        raise error
    assert not full or raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_bytes_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append(b.name), replace(a, b)))
    write_atomic(tmp_path / "a.txt", "four")
    assert done == [4, "a.txt"]
    with replacing(tmp_path / "model") as partial:
        fill(partial, "seven!!")
    assert done == [4, "a.txt", 7, "model"]


def test_hashes_tell_contents_and_names(tmp_path):
    fill(tmp_path / "a", "x")
    fill(tmp_path / "b", "x")
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    (tmp_path / "b/inner/a.txt").rename(tmp_path / "b/inner/c.txt")
    assert sha256(tmp_path / "a") != sha256(tmp_path / "b")
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
