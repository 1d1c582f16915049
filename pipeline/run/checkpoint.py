"""Checkpoints of a stage: `checkpoint-N/` with a manifest of hashes, and `latest`, which names the newest.

A checkpoint counts from the moment that `latest` names it; a kill before that leaves the earlier one.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run.files import replacing, sha256, write_atomic

KEEP_CHECKPOINTS = 2


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Let `write` fill `checkpoint-STEP/`, then name it in `latest` and remove all but the newest."""
    final, pointer = folder / f"checkpoint-{step}", folder / "latest"
    if pointer.exists() and pointer.read_text().strip() == final.name:
        return  # saved a moment ago, before a Ctrl-C
    with replacing(final) as partial:
        partial.mkdir()
        write(partial)
        manifest = {"step": step, "files": {p.name: sha256(p) for p in sorted(partial.iterdir())}}
        write_atomic(partial / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    write_atomic(pointer, final.name + "\n")
    steps = {int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*[0-9]")}
    past = sorted(n for n in steps if n <= step)  # later ones are of an abandoned run
    for old in steps - set(past[-KEEP_CHECKPOINTS:]):
        shutil.rmtree(folder / f"checkpoint-{old}")


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint, checked against its manifest; `None` where there is none.

    Raises:
        UserError: it is damaged; the message has the command that takes an earlier one.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    newest = folder / pointer.read_text().strip()
    try:
        manifest = json.loads((newest / "manifest.json").read_text())
        bad = [n for n, digest in manifest["files"].items() if sha256(newest / n) != digest]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{newest} is not readable ({error}); {way_out(folder, newest)}") from error
    if bad:
        way = way_out(folder, newest)
        raise UserError(f"{newest / bad[0]} does not match its manifest (corrupted); {way}")
    return manifest["step"], newest


def way_out(folder: Path, damaged: Path) -> str:
    """What to type when a checkpoint is damaged."""
    others = sorted((p.name for p in folder.glob("checkpoint-*[0-9]") if p != damaged), key=len)
    if others:
        return f"to go on from {others[-1]}: echo {others[-1]} > {folder / 'latest'}, then --resume again"
    return f"no older one is left: rm -r {folder} and run the stage again"
