"""The supervised loop of pretraining and SFT, and the checkpoints that all native stages share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from pipeline.run.directory import RunDir
from pipeline.train.learner import Learner
from pipeline.train.pack import Batch


def save_state(run_dir: RunDir, learner: Learner, step: int) -> None:
    """Checkpoint the learner after `step` steps."""

    def write(folder: Path) -> None:
        torch.save(learner.state_dict(), folder / "state.pt")

    run_dir.checkpoint(step, write)


def restore_state(run_dir: RunDir, learner: Learner) -> int:
    """Load the newest checkpoint, if any; the number of steps that it stands for."""
    newest = run_dir.latest()
    if newest is None:
        return 0
    step, folder = newest
    learner.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return step


def train_loop(
    run_dir: RunDir,
    learner: Learner,
    batches: Iterable[Batch],
    steps: int,
    log_every: int,
    checkpoint_every: int,
) -> None:
    """Update on each batch; log, checkpoint, and stop between steps after a Ctrl-C.

    Args:
        batches: one an update, the same every time; a resumed run skips those that it has had.
        log_every: metrics are those of the last step of each interval.
    """
    done = restore_state(run_dir, learner)
    tokens = 0
    run_dir.metrics.begin()
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        tokens += batch.tokens()
        if step <= done:
            continue
        began = time.monotonic()
        metrics = learner.supervised_update(batch)
        if step % log_every == 0 or step == steps:
            metrics |= {"data/tokens": tokens, "time/step_s": time.monotonic() - began}
            run_dir.log(step, steps, metrics)
        if step % checkpoint_every == 0 and step < steps:
            save_state(run_dir, learner, step)
        run_dir.stop_if_interrupted(lambda at=step: save_state(run_dir, learner, at))  # type: ignore[misc]
