"""Stages `zero`, `grpo`, `grpo2` and those of students: RL with group-relative advantages.

R1-Zero starts from the base with accuracy and format alone; the first RL stage of R1 starts from the cold
start and adds the language reward; the second covers all scenarios. `student_rl` and `distill_rl` do the same
to small dense students (Sec. 4.1). `Trainer.step` is DeepSeekMath's Algorithm 1:

    a batch of questions; G outputs of each, sampled from the policy       lines 5 to 7   round
    a reward for each output                                               line 8         grade
    its advantage over the other outputs of its group                      line 9         advantages
    updates that maximize the GRPO objective                               lines 10, 11   batches, update
    every `ref_refresh_steps` the reference becomes the policy             line 3

Papers  GRPO  arXiv:2402.03300 Sec. 4.1; R1 arXiv:2501.12948 Sec. 2.2, 2.3.2, 2.3.4; DAPO arXiv:2503.14476
"""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.settings.rollouts import GrpoSettings
from pipeline.stages.rounds import RoundTrainer, train_rounds
from pipeline.train.advantages import group_advantages
from pipeline.train.learner import PolicyObjective, score
from pipeline.train.losses import loss_named, takes_settings
from pipeline.train.pack import Batch, Per, pack, rollout_weights
from pipeline.train.rollouts import example, mean
from rollout.collect import Plan
from rollout.types import Graded


def run(config: GrpoSettings, run_dir: RunDir) -> None:
    """Train; leave `model/`."""
    train_rounds(config, run_dir, lambda: Trainer(config, run_dir))


class Trainer(RoundTrainer):
    """How a step of RL moves the policy."""

    config: GrpoSettings

    def __init__(self, config: GrpoSettings, run_dir: RunDir) -> None:
        """Raises `UserError`, for the loss too."""
        try:
            self.loss = loss_named(config.loss)
        except ValueError as error:
            raise UserError(str(error)) from error
        plan = Plan(config.prompts_per_step, config.group_size, config.dynamic_sampling, config.most_requests)
        super().__init__(
            config,
            run_dir,
            plan,
            config.rewards,
            overlong_buffer=config.overlong_buffer,
            max_idle_steps=config.max_idle_steps,
            reference=bool(config.kl_coef),
        )
        settings = {name: getattr(config, name) for name in takes_settings(self.loss, config.loss)}
        self.objective = PolicyObjective(self.loss, settings, config.temperature, config.tis_cap)

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `step` (from 1): its metrics, and transcripts for samples.jsonl."""
        config = self.config
        done, sampling = self.round(step)
        began, graded = time.monotonic(), done.graded
        advantages = self.advantages(graded)
        batches = self.batches(graded, advantages)
        metrics = self.update(batches)
        scorings = (self.reference is not None) + (len(batches) > 1)
        metrics |= self.cost(batches, time.monotonic() - began, scorings) | sampling
        if config.ref_refresh_steps and step % config.ref_refresh_steps == 0 and self.reference is not None:
            self.reference = self.policy.frozen()
        groups = [advantages[i : i + config.group_size] for i in range(0, len(graded), config.group_size)]
        metrics["reward/groups_with_spread"] = mean([float(any(group)) for group in groups])
        self.watch.look(step, graded, metrics["reward/groups_with_spread"])
        if config.dynamic_sampling:
            metrics["rollout/groups_sampled"] = done.sampled
        return metrics, self.shown(graded, advantages)

    def advantages(self, graded: Sequence[Graded]) -> list[float | None]:
        """Each rollout's advantage over its group; None where its verifier failed."""
        rewards = [None if g.verdict == "error" else g.reward for g in graded]
        size, scale = self.config.group_size, self.config.advantage_scale
        groups = (rewards[start : start + size] for start in range(0, len(graded), size))
        return [advantage for group in groups for advantage in group_advantages(group, scale)]

    def batches(self, graded: Sequence[Graded], advantages: Sequence[float | None]) -> list[Batch]:
        """Packed rollouts, a batch a minibatch of groups; a minibatch in which no rollout counts has none.

        A rollout without advantage changes nothing unless there is a KL penalty, and is left out of the
        forward; it still counts in the denominator of the loss.
        """
        config = self.config
        share = len(graded) // config.minibatches
        per: Per = getattr(self.loss, "per", "rollout")
        out = []
        for start in range(0, len(graded), share):
            both = zip(graded[start : start + share], advantages[start : start + share], strict=True)
            pairs = [(g.rollout, a) for g, a in both if a is not None]
            weights = rollout_weights([len(r.token_ids) for r, _ in pairs], per, config.max_tokens)
            trained = ((r, a, w) for (r, a), w in zip(pairs, weights, strict=True) if a or config.kl_coef)
            if examples := [example(*of) for of in trained]:
                out.append(pack(examples, self.place.micro_tokens(config)))
        return out

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update a batch; the metrics of the last, and the worst mismatch between engine and trainer.
        Raises `Stopped`: as `check_mismatch`."""
        config = self.config
        old: list[list[Tensor] | None] = [None] * len(batches)
        if len(batches) > 1:  # later updates move away from the policy that sampled
            parts = [b.micro_batches(self.place.device) for b in batches]
            old = [[score(self.policy, part, config.temperature) for part in of] for of in parts]
        metrics, mismatch = dict[str, float](), 0.0
        for batch, logprobs in zip(batches, old, strict=True):
            metrics = self.learner.policy_update(batch, self.objective, logprobs, self.reference)
            mismatch = max(mismatch, metrics.get("policy/mismatch_kl", 0.0))  # none of a skipped update
        if ":" in config.loss:  # ours stand in the glossary; a missing line there is a defect
            self.run_dir.metrics.explain(dict.fromkeys(metrics, f"a metric of the loss {config.loss}"))
        self.check_mismatch(mismatch)
        return metrics
