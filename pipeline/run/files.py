"""Files and folders that appear complete or not at all, and their hashes."""

import errno
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for the body to fill, as file or folder; it replaces `path` when the body ends without an error.
    All bytes are on disk before the rename, so that a crash of the machine cannot leave an empty file. A
    folder that is replaced stands beside it as `.old` until the new one has its name."""
    partial, old = (path.with_name(path.name + suffix) for suffix in (".partial", ".old"))
    remove(partial)
    try:
        yield partial
        for file in (partial, *partial.rglob("*")):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if path.is_dir():
            remove(old)
            path.rename(old)
        partial.replace(path)
        remove(old)
    except Exception as error:
        full = is_full(error, path.parent)
        remove(partial)  # a full disk gets its space back
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for lack of space: torch's and safetensors' errors have no errno."""
    told = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
    return not isinstance(error, OSError) and (told or shutil.disk_usage(folder).free < 1 << 16)


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Replace the file `path` in one step: a reader sees the old text or the new one, both complete. A lone
    surrogate, which UTF-8 cannot hold, is written as JSON escapes it."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines([text] if isinstance(text, str) else text)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that we wrote; empty where there is no file. Raises `UserError`: the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise damaged(path, f"a {type(found).__name__}, not an object")
    return found


def damaged(path: Path, why: object) -> UserError:
    """The error of a file of ours that cannot be what we wrote."""
    way = f"restore it from a copy, or remove {path.parent} and make it again"
    return UserError(f"{path} is damaged ({why}); {way}")


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's bytes, or of a folder's file names and hashes."""
    if path.is_dir():
        parts = sorted(p for p in path.rglob("*") if p.is_file())
        listing = "".join(f"{part.relative_to(path)} {sha256(part)}\n" for part in parts)
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as a table, or a `UserError` that names the file and the line."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = file.parent.is_dir()
        folder = file.parent if there else file.parent.parent
        have = ", ".join(sorted(path.name for path in folder.glob("*.toml" if there else "*/")))
        raise UserError(f"no config {file}; {folder} has: {have or 'nothing'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not a TOML file: {error}") from error
