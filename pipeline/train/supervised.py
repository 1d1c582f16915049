"""The supervised loop of pretraining and SFT, and the checkpoints that all native stages share."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.run.directory import RunDir
from pipeline.run.metrics import say
from pipeline.run.usage import Usage
from pipeline.settings.supervised import StopSettings
from pipeline.train.learner import Learner, score
from pipeline.train.pack import Batch


def save_state(run_dir: RunDir, step: int, state: dict[str, Any], applied: int | None = None) -> None:
    """Checkpoint the state after `step` steps; see `RunDir.checkpoint`."""

    def write(folder: Path) -> None:
        with (folder / "state.pt").open("wb") as file:  # given a path, torch hides that the disk is full
            torch.save(state, file)

    run_dir.checkpoint(step, write, applied)


def load_state(run_dir: RunDir) -> tuple[int, dict[str, Any]]:
    """Steps that the newest checkpoint stands for, and its state; 0 and nothing where there is none.

    The state is read into host memory, a GPU's too. Its tensors are then copied in place, so that a GPU never
    holds a second one."""
    newest = run_dir.latest()
    if newest is None:
        return 0, {}
    return newest[0], torch.load(newest[1] / "state.pt", map_location="cpu", weights_only=True)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What decides that a policy has learned enough; see `StopSettings`."""

    batch: Batch
    settings: StopSettings

    def check(self, learner: Learner, step: int) -> dict[str, float]:
        """After step `step`: the loss, where it is due; once it is low enough, the rate decays."""
        if learner.early is not None or step % self.settings.every:
            return {}
        loss = self.loss(learner)
        if loss <= self.settings.loss:
            learner.decay_now()
            end = f"the rate falls now, and update {learner.total_updates} is the last"
            say(f"held-out loss {loss:.3g}: {end}")
        return {"heldout/loss": loss}

    def loss(self, learner: Learner) -> float:
        """Of the documents now, nats a token."""
        parts = self.batch.micro_batches(learner.device)
        return sum(-float(p.ahead(1)[2] @ score(learner.policy, p, 1.0)) for p in parts)

    def warn(self, learner: Learner) -> None:
        """Say so, where the policy ends without having learned enough."""
        if learner.early is None and (loss := self.loss(learner)) > self.settings.loss:
            bound = f"above stop.loss={self.settings.loss:g} after {learner.updates} updates"
            say(f"held-out loss {loss:.3g}, still {bound}: it has not learned enough; raise steps")


def train_loop(
    run_dir: RunDir,
    learner: Learner,
    batches: Iterable[Batch],
    log_every: int,
    checkpoint_every: int,
    held_out: HeldOut | None = None,
) -> None:
    """Update on each batch; log, checkpoint, and stop between steps after a Ctrl-C.

    `batches` has one an update, the same every time: a resumed run skips those before its checkpoint. The
    metrics are those of the last step of each `log_every`, and of those after which `held_out` is scored."""
    done, state = load_state(run_dir)
    if done:
        learner.load_state_dict(state)
    tokens = 0
    usage = Usage(learner.policy.config, learner.device, mtp=bool(learner.mtp_coef))
    run_dir.metrics.begin()
    for step, batch in enumerate(batches, start=1):
        tokens += sum(batch.lengths)
        if step <= done:
            continue
        if step > learner.total_updates:
            break
        began = time.monotonic()
        metrics = learner.supervised_update(batch)
        seconds = time.monotonic() - began
        scored = held_out.check(learner, step) if held_out else {}
        steps = learner.total_updates
        if step % log_every == 0 or step == steps or scored:
            metrics |= scored | {
                "data/tokens": tokens,
                "time/step_s": seconds,
                **usage.of(batch.lengths, seconds),
            }
            run_dir.log(step, steps, metrics)
        if step % checkpoint_every == 0 and step < steps:
            save_state(run_dir, step, learner.state_dict(), learner.guard.applied)
        run_dir.stop_if_interrupted(lambda at=step: save_state(run_dir, at, learner.state_dict()))  # type: ignore[misc]
    learner.guard.check_trained(run_dir.stage.name)
    if held_out:
        held_out.warn(learner)
