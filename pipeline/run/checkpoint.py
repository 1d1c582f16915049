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
        files = {p.name: sha256(p) for p in sorted(partial.iterdir())}
        manifest = {"step": step, "applied": applied, "files": files}
        write_atomic(partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    write_atomic(pointer, final.name + "\n")
    past = [n for n in steps_in(folder) if n <= step]  # later ones are of an abandoned run
    good = [n for n in past if applied_at(folder, n) is not None]
    for old in set(steps_in(folder)) - {*good[-KEEP_CHECKPOINTS:], *past[-KEEP_CHECKPOINTS:]}:
        shutil.rmtree(folder / f"checkpoint-{old}")


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints that lie in `folder`, ascending."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*"))
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
    try:
        manifest = json.loads((newest / "manifest.json").read_text())
        step: int = manifest["step"]
        bad = [n for n, digest in manifest["files"].items() if sha256(newest / n) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{newest} is not readable ({error}); {way_out(folder, newest)}") from error
    if bad:
        way = way_out(folder, newest)
        raise UserError(f"{newest / bad[0]} does not match its manifest (corrupted); {way}")
    return step, newest


def way_out(folder: Path, damaged: Path) -> str:
    """What to type when a checkpoint is damaged."""
    others = [name for n in steps_in(folder) if (name := f"checkpoint-{n}") != damaged.name]
    if others:
        return f"to go on from {others[-1]}: echo {others[-1]} > {folder / 'latest'}, then --resume again"
    return f"no older one is left: rm -r {folder} and run the stage again"
