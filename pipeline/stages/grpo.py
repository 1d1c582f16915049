"""Stages `zero`, `grpo` and `grpo2`: reinforcement learning with group-relative advantages.

One loop: draw a group of completions for each prompt, grade them by rule, judge each against its group,
update. R1-Zero starts from the base with accuracy and format alone; the first RL stage of R1 starts
from the cold start and adds the language reward; the second covers all scenarios.

Papers  GRPO  arXiv:2402.03300 Sec. 4.1; R1 arXiv:2501.12948 Sec. 2.2, 2.3.2, 2.3.4; DAPO arXiv:2503.14476
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.settings.grpo import GrpoSettings
from rollout.engine import EngineDied, StaleWeights

if TYPE_CHECKING:
    from pipeline.stages.rl import Trainer


def run(config: GrpoSettings, run_dir: RunDir) -> None:
    """Train; leave `model/`."""
    from pipeline.stages.rl import Trainer
    from pipeline.train.policy import save_policy

    trainer = Trainer(config, run_dir)
    try:
        loop(config, run_dir, trainer)
    except (EngineDied, StaleWeights) as error:
        raise UserError(f"{error} To go on from the last checkpoint: {run_dir.command} --resume") from error
    finally:
        trainer.close()
    policy, tokenizer = trainer.policy, trainer.tokenizer
    run_dir.save_model(lambda path: save_policy(policy, tokenizer, path, config.template, config.story))


def loop(config: GrpoSettings, run_dir: RunDir, trainer: Trainer) -> None:
    """The steps, logged, checkpointed, and interruptible between any two."""
    first = trainer.restore() + 1
    run_dir.metrics.begin()
    for step in range(first, config.steps + 1):
        began = time.monotonic()
        metrics, records = trainer.step(step)
        if config.eval_every and (step % config.eval_every == 0 or step == 1):
            metrics |= trainer.heldout()
        metrics["time/step_s"] = time.monotonic() - began
        run_dir.samples(step, records)
        run_dir.log(step, config.steps, metrics)
        if step % config.checkpoint_every == 0 and step < config.steps:
            trainer.checkpoint(step)
        run_dir.stop_if_interrupted(lambda at=step: trainer.checkpoint(at))  # type: ignore[misc]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
