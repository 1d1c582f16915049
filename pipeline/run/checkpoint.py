"""Checkpoints of a stage: `checkpoint-N/` with a manifest of hashes, and `latest`, which names the newest.

A checkpoint counts from the moment that `latest` names it; a kill before that leaves the earlier one.

One that a rollback may go to has in its manifest the number of updates `applied` until then. One of a Ctrl-C
has none, since rollbacks must not depend on when a run was stopped.
"""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run.files import replacing, sha256, write_atomic

KEEP_CHECKPOINTS = 2


def save_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], applied: int | None = None
) -> None:
    """Let `write` fill `checkpoint-STEP/`, then name it in `latest` and remove all but the newest."""
    final, pointer = folder / f"checkpoint-{step}", folder / "latest"
    if pointer.exists() and pointer.read_text().strip() == final.name:
        return  # saved a moment ago, before a Ctrl-C
    with replacing(final) as partial:
        partial.mkdir()
        write(partial)
        write_manifest(partial, step=step, applied=applied)
    write_atomic(pointer, final.name + "\n")
    past = [n for n in steps_in(folder) if n <= step]  # later ones are of an abandoned run
    good = [n for n in past if applied_at(folder, n) is not None]
    for old in set(steps_in(folder)) - {*good[-KEEP_CHECKPOINTS:], *past[-KEEP_CHECKPOINTS:]}:
        shutil.rmtree(folder / f"checkpoint-{old}")


def write_manifest(folder: Path, **about: Any) -> None:
    """Write, last of all files of a folder, its manifest.json: `about` it, and the hash of each file."""
    files = {p.name: sha256(p) for p in sorted(folder.iterdir())}
    write_atomic(folder / "manifest.json", json.dumps(about | {"files": files}, indent=2) + "\n")


def read_manifest(folder: Path, way: str) -> dict[str, Any]:
    """The manifest of a folder, checked. Raises `UserError`: it is damaged; `way` says what to type."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        bad = [n for n, digest in manifest["files"].items() if sha256(folder / n) != digest]
        int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not readable ({error}); {way}") from error
    if bad:
        raise UserError(f"{folder / bad[0]} does not match its manifest (corrupted); {way}")
    return manifest


def steps_in(folder: Path, kind: str = "checkpoint") -> list[int]:
    """Steps of the checkpoints that lie in `folder`, or of another `kind` of folders, ascending."""
    found = (re.fullmatch(rf"{kind}-(\d+)", p.name) for p in folder.glob(f"{kind}-*"))
    return sorted(int(match[1]) for match in found if match)


def applied_at(folder: Path, step: int) -> int | None:
    """Updates applied until a checkpoint; None where a rollback may not go to it, or it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / f"checkpoint-{step}/manifest.json").read_text())["applied"])
    return None


def go_back(folder: Path, applied: int, floor: int) -> int:
    """Make `latest` the newest checkpoint from which weights moved on, with fewer than `applied` updates, or
    that of step `floor`; its step, 0 for the start of the run."""
    now, good = newest_checkpoint(folder), 0
    for n in steps_in(folder) if now else ():
        at = applied_at(folder, n)
        if now and n <= now[0] and at is not None and (at < applied or n <= floor):
            good = n
    if good:
        write_atomic(folder / "latest", f"checkpoint-{good}\n")
    else:
        (folder / "latest").unlink(missing_ok=True)
    return good


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint, checked against its manifest; `None` where there is none.
    Raises `UserError`: it is damaged; the message has the command that takes an earlier one."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    newest = folder / pointer.read_text(errors="replace").strip()
    return read_manifest(newest, way_out(folder, newest))["step"], newest


def way_out(folder: Path, damaged: Path) -> str:
    """What to type when a checkpoint is damaged."""
    others = [name for n in steps_in(folder) if (name := f"checkpoint-{n}") != damaged.name]
    if others:
        return f"to go on from {others[-1]}: echo {others[-1]} > {folder / 'latest'}, then --resume again"
    return f"no older one is left: rm -r {folder} and run the stage again"
