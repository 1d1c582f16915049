"""Stages `zero`, `grpo` and `grpo2`: reinforcement learning with group-relative advantages.

One loop: draw a group of completions for each prompt, grade them by rule, judge each against its group,
update. R1-Zero starts from the base with accuracy and format alone; the first RL stage of R1 starts
from the cold start and adds the language reward; the second covers all scenarios.

Papers  GRPO  arXiv:2402.03300 Sec. 4.1; R1 arXiv:2501.12948 Sec. 2.2, 2.3.2, 2.3.4; DAPO arXiv:2503.14476
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.arguments import OptimConfig, StageConfig
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from rewards.reward import check_weights
from rollout.engine import EngineDied, StaleWeights
from rollout.settings import RolloutSettings

if TYPE_CHECKING:
    from pipeline.stages.rl import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(StageConfig):
    """GRPO from verifiable rewards. Defaults are the paper's where it says, else the tiny chain's."""

    init_from: str = "pretrain"
    """Model that the policy (and the reference) starts from: a stage of this run, or a directory."""
    template: str = "r1"
    """Prompt template, a key of `rollout.text.tokenizer.TEMPLATES`."""
    problems: tuple[str, ...] = ("generator:tiny",)
    """Problem sources: `generator:TASK`, a JSONL file, a benchmark's name, or `hub:OWNER/NAME:SPLIT`."""
    pool: int = 4_000
    """Problems taken from each source."""
    data: Path | None = None
    """Folder of local data files; default: the environment variable R1_DATA."""
    steps: int = 40
    """Rounds of rollouts."""
    prompts_per_step: int = 32
    """Distinct prompts per round (R1-Zero: 32)."""
    group_size: int = 16
    """Rollouts per prompt, the paper's G; their mean reward is the baseline (R1-Zero: 16)."""
    minibatches: int = 1
    """Optimizer updates per round; each takes an equal share of the groups (R1-Zero: 16 a round of 8,192)."""
    max_tokens: int = 96
    """Longest completion, tokens. A longer one is cut and graded as it stands (R1-Zero: 32,768)."""
    temperature: float = 1.0
    """Of sampling (R1-Zero: 1; R1's second RL stage: 0.7)."""
    dynamic_sampling: bool = False
    """Draw on until the step has its number of groups whose rewards differ (DAPO, Sec. 3.2)."""
    most_draws: int = 4
    """Dynamic sampling: requests of a step, after which it is filled up with groups without spread."""
    overlap: bool = False
    """Draw a step's rollouts while the step before is trained on: they are one step off-policy."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """The engine that draws, in the trainer's process or in workers."""
    rewards: Mapping[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """Weight of each reward by name, or by "module:function" for your own; the weighted values are summed
    (R1-Zero: accuracy and format, equal)."""
    overlong_buffer: int = 0
    """Tokens before `max_tokens` over which the reward `overlong` falls to -1 (DAPO, Eq. 13)."""
    advantage_scale: Literal["std", "none"] = "std"
    """`std` divides a group's advantages by their deviation (GRPO), `none` does not (Dr. GRPO)."""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """How much each token counts: mean in a rollout then over rollouts, mean over tokens, or a constant."""
    clip_low: float = 0.2
    """Lower clip of the ratio, 1 - clip_low (GRPO's epsilon)."""
    clip_high: float = 0.2
    """Upper clip, 1 + clip_high (R1's first RL stage: 10; DAPO: 0.28)."""
    kl_coef: float = 0.001
    """Weight of the KL penalty, the paper's beta (R1: 0.001). 0 = no reference model is kept."""
    ref_refresh_steps: int = 400
    """Steps after which the reference becomes the current policy (R1: 400); 0 = never."""
    tis_cap: float = 2.0
    """Cap of the importance correction between engine and trainer."""
    max_mismatch_kl: float = 0.1
    """Stop when the KL between engine and trainer exceeds this, nats a token: the weights have come apart."""
    row_tokens: int = 256
    """Tokens of a packed row; at least prompt plus completion."""
    micro_rows: int = 32
    """Rows of one forward and backward."""
    eval_every: int = 10
    """Steps between greedy checks on a slice of the held-out problems; 0 = none. Never trained on."""
    eval_problems: int = 64
    """Held-out problems of that check."""
    eval_source: str = "generator:tiny"
    """Where they come from."""
    log_samples: int = 32
    """Transcripts a step kept in samples.jsonl."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    story: str = "GRPO policy"
    """Title of the model card."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its schedule, one step an update."""

    def __post_init__(self) -> None:
        if self.prompts_per_step % self.minibatches:
            fits = [n for n in range(1, self.prompts_per_step + 1) if self.prompts_per_step % n == 0]
            nearest = min(fits, key=lambda n: abs(n - self.minibatches))
            raise ValueError(
                f"minibatches={self.minibatches} does not divide prompts_per_step={self.prompts_per_step}; "
                f"the nearest that does is {nearest}."
            )
        if self.most_draws < 1:
            raise ValueError(f"most_draws={self.most_draws} must be at least 1.")
        check_weights(self.rewards)
        if not 0 <= self.overlong_buffer <= self.max_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} must lie in 0 .. max_tokens={self.max_tokens}."
            )
        if self.overlong_buffer and "overlong" not in self.rewards:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} has no effect: give the reward overlong a weight."
            )
        if self.rewards.get("overlong") and not self.overlong_buffer:
            raise ValueError("rewards.overlong has no effect: set overlong_buffer, the tokens of its ramp.")
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be at least 2: a group is its own baseline.")


def run(config: Config, run_dir: RunDir) -> None:
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


def loop(config: Config, run_dir: RunDir, trainer: Trainer) -> None:
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
