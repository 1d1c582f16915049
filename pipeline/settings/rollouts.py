"""Settings of the stages that generate: RL (`zero`, `grpo`, ...), `on_policy`, and `reject`."""

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pipeline.settings.common import (
    EnvironmentSettings,
    GradingSettings,
    HeldoutSettings,
    LoggedSettings,
    OptimSettings,
    Sampling,
    TrainSettings,
)
from rewards.registry import own_function
from rewards.reward import check_weights
from rollout.ranges import (
    MOST_SAMPLES,
    Count,
    Natural,
    NotNegative,
    Positive,
    Range,
    Samples,
    Settings,
    Share,
)
from rollout.settings import RolloutSettings

Fault = Literal["stale", "fp8", "route", "template", "eos"]
"""What `inject` can do to an RL stage."""
LOSS_NAMES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
"""Names of the functions of `pipeline.train.losses`."""


def check_loss(name: str) -> None:
    """Raise ValueError for a loss that does not exist, with the nearest; a user's module is imported."""
    if ":" in name:
        own_function(name)
    elif name not in LOSS_NAMES:
        near = difflib.get_close_matches(name, LOSS_NAMES, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        names = f'{", ".join(LOSS_NAMES)}, or "module:function"'
        raise ValueError(f"unknown loss {name!r}; {hint}There are: {names}.")


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings(Settings):
    """Weight of an advantage where the engine sampled with other probabilities than the trainer's: the ratio
    of both, with bounds (`pipeline.train.correction`)."""

    anchor: Literal["old", "engine"] = "old"
    """The old policy of the loss: `old`, the one that sampled, as the trainer scores it (the papers');
    `engine`, the engine's own log-probabilities: the loss's ratio is then all the correction there is, and
    rollouts are not scored before the updates of a round."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """The ratio of a token, or one a rollout: the product over its tokens, or their geometric mean."""
    treatment: Literal["truncate", "mask"] = "truncate"
    """`truncate` clips the ratio to [low, high]; `mask` sets it to 0 outside and keeps it inside. (TRL's
    token_truncate and so on; IcePop: token, mask, 0.5 to 5; bands on the geometric mean: 0.99 to 1.01.)"""
    low: Annotated[float, Range(0, 1)] = 0.0
    """Lower bound of the ratio."""
    high: Annotated[float, Range(1)] = 2.0
    """Upper bound of the ratio. low = high = 1 with `truncate`: no correction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.treatment == "mask" and (self.low == 1 or self.high == 1):
            bounds = f"bounds {self.low:g} and {self.high:g} masks where engine and trainer agree"
            right = "set low below 1 and high above 1"
            raise ValueError(f"treatment=mask with {bounds}; {right}.")
        if self.anchor == "engine" and replace(self, anchor="old") != CorrectionSettings():
            others = "level, treatment, low and high have no effect: leave them out"
            raise ValueError(f"anchor=engine leaves nothing to correct; {others}.")


@dataclass(frozen=True, kw_only=True)
class GeneratingSettings(Sampling, GradingSettings, HeldoutSettings, LoggedSettings):
    """What both have in common."""

    problems: tuple[str, ...] = ("generator:tiny",)
    """Problem sources: `generator:TASK`, a file of rows, a benchmark's name, or `hub:OWNER/NAME:SPLIT`."""
    pool: Count = 4_000
    """Problems taken from each source, from its start."""
    hold_back: Share = 0.5
    """Share of the asserts in a question's text (MBPP) that training does not show, rounded up, one always
    shown; all are graded, so a program that only knows the shown ones fails. 0 = the public protocol."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """The engine that generates, in the trainer's process or in workers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.problems:
            raise ValueError("problems must name at least one source.")


@dataclass(frozen=True, kw_only=True)
class RoundSettings(GeneratingSettings, TrainSettings):
    """What RL and on-policy distillation have in common: rounds of the policy's own samples."""

    init_from: str = "pretrain"
    """Model to start from: a stage of this run (or STAGE/PART), a directory, or OWNER/NAME (hub)."""
    steps: Count = 40
    """Rounds of rollouts."""
    prompts_per_step: Count = 32
    """Distinct prompts per round (R1-Zero: 32)."""
    group_size: Annotated[int, Range(1, MOST_SAMPLES)] = 16
    """Rollouts per prompt; they share its prefill."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Order of the problems in an epoch: shuffled by the seed, or as their sources have them."""
    minibatches: Count = 1
    """Optimizer updates per round; each takes an equal share of the groups (R1-Zero: 16 a round of 8,192)."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in the loss; above 0, since greedy rollouts of a prompt are alike
    (R1-Zero: 1; R1's second RL: 0.7)."""
    staleness: Natural = 0
    """Optimizer updates by which the weights that sampled a step's rollouts may be older than what it trains;
    a multiple of minibatches, M. At most staleness / M rounds are then generated ahead, while others are
    trained on. An engine in the trainer's process keeps a copy of the weights for each step whose rounds are
    not begun, and the run repeats bit by bit. Workers get every update at once, and completions under way go
    on with it: above M they depend on timing. Then set correction.anchor = engine, so that the loss clips the
    distance from the weights that sampled. 0 = on-policy: trainer and engine wait for each other."""
    share_prompts: bool = False
    """Training forwards compute a group's prompt once, not once a sample: the same gradients to rounding,
    1.1 to 2 times as fast on a CPU, by the prompts' share of the tokens. A router's load counts it once."""
    max_mismatch_kl: Positive = 0.1
    """Stop when the KL between engine and trainer exceeds this, nats a token: the weights have come apart."""
    eval_every: Natural = 10
    """Steps between greedy checks on a slice of the held-out problems; 0 = none. Never trained on."""
    eval_problems: Count = 64
    """Held-out problems of that check."""
    eval_source: str = "generator:tiny"
    """Where they come from."""
    log_samples: Natural = 32
    """Transcripts a step kept in samples.jsonl."""
    checkpoint_every: Count = 10
    """Steps between checkpoints."""
    story: str = "Policy that learned from its own samples"
    """Title of the model card."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """AdamW and its schedule, one step an update."""

    @property
    def title(self) -> str:
        """Of the model card."""
        return self.story

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts_per_step % self.minibatches:
            fits = [n for n in range(1, self.prompts_per_step + 1) if self.prompts_per_step % n == 0]
            nearest = min(fits, key=lambda n: abs(n - self.minibatches))
            raise ValueError(
                f"minibatches={self.minibatches} does not divide prompts_per_step={self.prompts_per_step}; "
                f"the nearest that does is {nearest}."
            )
        if self.share_prompts and (self.optim.balance_alpha or getattr(self, "mtp_coef", 0.0)):
            other = "optim.balance_alpha" if self.optim.balance_alpha else "mtp_coef"
            raise ValueError(f"share_prompts is not for {other}, which needs whole sequences: leave it out.")
        if self.staleness % self.minibatches:
            above = self.staleness + self.minibatches - self.staleness % self.minibatches
            raise ValueError(
                f"staleness={self.staleness} counts updates, and a step has minibatches={self.minibatches}: "
                f"take a multiple, such as {above}."
            )
        if self.staleness and self.rollout.vllm.sleep == "on":
            raise ValueError(
                f"vllm.sleep=on has no effect with staleness={self.staleness}, as the engine always works: "
                "leave one out."
            )


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(EnvironmentSettings, RoundSettings):
    """GRPO from verifiable rewards. Defaults are the paper's where it has a value, else the tiny chain's."""

    group_size: Annotated[int, Range(2, MOST_SAMPLES)] = 16
    """Rollouts per prompt, the paper's G; their mean reward is the baseline (R1-Zero: 16)."""
    dynamic_sampling: bool = False
    """Sample until the step has its number of groups whose rewards differ (DAPO, Sec. 3.2)."""
    flat_again: Share = 1.0
    """Share of the later epochs in which a problem comes again whose last group had no spread, because it is
    always or never solved (a curriculum); 1 = all of them."""
    most_requests: Count = 4
    """Dynamic sampling: requests of a step, after which it is filled up with groups without spread."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """Weight of each reward by name, or by "module:function" for your own; the weighted values are summed
    (R1-Zero: accuracy and format, equal). A table in a file replaces the default, flags add to it."""
    overlong_buffer: Natural = 0
    """Tokens before `max_tokens` over which the reward `overlong` falls to -1 (DAPO, Eq. 13)."""
    overlong_filter: bool = False
    """Rollouts cut at `max_tokens` have no weight in the loss and are not in its denominator; their rewards
    still count in the mean of their group (DAPO, Sec. 3.4)."""
    advantage_scale: Literal["std", "none", "batch"] = "std"
    """`std` divides a group's advantages by their deviation (GRPO), `none` does not (Dr. GRPO), `batch` by
    the deviation of all advantages of the step (REINFORCE++'s baseline, arXiv:2501.03262)."""
    loss: str = "grpo"
    """Policy loss: grpo, dapo, dr_grpo, gspo, cispo, or "module:function" for your own."""
    clip_low: Share = 0.2
    """Lower clip of the ratio, 1 - clip_low (GRPO's epsilon; GSPO: 3e-4; CISPO has none: 1)."""
    clip_high: NotNegative = 0.2
    """Upper clip, 1 + clip_high (R1's first RL stage: 10; DAPO: 0.28; GSPO: 4e-4)."""
    dual_clip: NotNegative = 0.0
    """Bound, above 1, of the ratio where the advantage is negative (arXiv:1912.09729, Eq. 5, where it is 3);
    of grpo, dapo and dr_grpo. 0 = none."""
    kl_coef: NotNegative = 0.001
    """Weight of the KL penalty, the paper's beta (R1: 0.001). 0 = no reference model is kept."""
    kl_estimator: Literal["k3", "unbiased"] = "k3"
    """Of the KL in the loss: GRPO's k3, or k3 times the ratio of current and old policy, whose gradient is
    the KL's (DeepSeek-V3.2, arXiv:2512.02556, Eq. 7)."""
    entropy_coef: NotNegative = 0.0
    """Weight of the policy's entropy, which the loss then rewards, in the loss's token weights. 0 = none."""
    ref_refresh_steps: Natural = 400
    """Steps after which the reference becomes the current policy (R1: 400); 0 = never."""
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    """Importance correction between engine and trainer."""
    router_replay: bool = False
    """Train with the experts that the engine chose for each token (R3, arXiv:2510.11370), recorded with the
    rollouts. For engines that round otherwise than the trainer: near-ties of the gate then fall differently,
    and each such token is off-policy."""
    mtp_coef: NotNegative = 0.0
    """Weight of the cross-entropy of multi-token-prediction modules on the sampled tokens, so that they go on
    guessing the policy well (`rollout.local.speculate`). They learn from detached states, and the policy is
    trained as without them. 0 = they stay as they are, as they do in workers."""
    inject: Literal["", Fault] = ""
    """A fault on purpose, for teaching and tests; the run names it within two steps. The engine: stale =
    keeps the weights that it began with; fp8 = has its matrices rounded to E4M3; route = has noise on the
    biases that choose experts; template = reads each prompt without its last token; eos = drops a
    completion's end token."""
    max_idle_steps: Natural = 10
    """Stop after this many steps in a row in which no group's rewards differ, or every rollout is cut; they
    teach nothing. 0 = never."""
    record: tuple[int, ...] = ()
    """Steps of which everything is kept that their update depends on, for `python -m pipeline replay`: each
    takes the disk space of a checkpoint. Recording leaves the bits as they are."""
    record_every: Natural = 0
    """Record every step that this divides, too; 0 = none."""

    @property
    def title(self) -> str:
        """The story; of a faulty run it says so."""
        return f"{self.story} (trained with a fault on purpose: {self.inject})" if self.inject else self.story

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [step for step in self.record if not 1 <= step <= self.steps]:
            raise ValueError(f"record={wrong[0]} must be one of the steps, 1 to {self.steps}.")
        check_weights(self.rewards)
        check_loss(self.loss)
        if self.dual_clip and (self.dual_clip <= 1 or self.loss in ("gspo", "cispo")):
            why = "must be above 1, or 0" if self.dual_clip <= 1 else f"has no effect on the loss {self.loss}"
            raise ValueError(f"dual_clip={self.dual_clip:g} {why}; leave it out.")
        if self.kl_estimator != "k3" and not self.kl_coef:
            raise ValueError(f"kl_estimator={self.kl_estimator} has no effect with kl_coef=0; leave it out.")
        if self.inject and (self.rollout.workers or self.rollout.engine not in ("auto", "native", "dense")):
            raise ValueError(
                f"inject={self.inject!r} needs an engine in the trainer's process: rollout.engine auto and "
                "rollout.workers 0."
            )
        if self.inject and self.staleness:
            raise ValueError(f"inject={self.inject!r} needs staleness=0: old rollouts would hide the fault.")
        if not self.environment and "environment" in self.rewards:
            raise ValueError("the reward environment has no effect without one: set environment, too.")
        if self.router_replay and self.rollout.workers and self.staleness > self.minibatches:
            raise ValueError(
                f"router_replay is not for workers with staleness={self.staleness}: new weights choose other "
                f"experts than those that sampled; take staleness={self.minibatches}."
            )
        if self.router_replay and self.environment and self.rollout.engine == "vllm":
            raise ValueError(
                "vLLM records no experts of rollouts that an environment's strings stop: leave one out."
            )
        if self.environment and self.inject:
            raise ValueError(f"inject={self.inject!r} is for rollouts of one turn: leave environment out.")
        buffer = f"overlong_buffer={self.overlong_buffer}"
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"{buffer} must be at most max_tokens={self.max_tokens}.")
        weight = self.rewards.get("overlong", 0.0)
        if bool(self.overlong_buffer) != bool(weight):
            raise ValueError(
                f"{buffer} and the weight of the reward overlong ({weight:g}) have an effect only together: "
                "set both or neither."
            )


NOT_OF_THE_UPDATE = {
    *("group_size", "dynamic_sampling", "most_requests", "rewards", "overlong_buffer", "ref_refresh_steps"),
    *("max_idle_steps", "record", "record_every", "flat_again", "router_replay", "mtp_coef", "inject"),
    *("environment", "max_turns"),
}
"""Settings of `GrpoSettings` alone that a step's update does not depend on, given its rollouts."""


@dataclass(frozen=True, kw_only=True)
class ReplaySettings(Settings):
    """Repeat the update of a recorded RL step. With settings of its objective (--loss, --clip-high ...; of a
    group also by the last name: --level) the gradient under these is computed too, at the same weights."""

    folder: Path
    """The stage's run directory, such as runs/tiny/zero."""
    step: Natural = 0
    """Which of its recorded steps; 0 = the last."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one."""


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings(RoundSettings):
    """On-policy distillation (GKD, arXiv:2306.13649): the student samples, the teacher scores each token."""

    init_from: str = "student"
    """The student's start: a stage of this run (or STAGE/PART), a directory, or OWNER/NAME (hub)."""
    teacher: str = "grpo2"
    """Model that scores, likewise; native or dense, with the student's vocabulary."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """Of the next-token distributions s (student) and t (teacher): KL(s || t), KL(t || s), or the generalized
    Jensen-Shannon divergence."""
    beta: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.5
    """Of jsd: the teacher's share of the mixture; near 0 it goes as KL(t || s), near 1 as KL(s || t)."""


@dataclass(frozen=True, kw_only=True)
class RejectSettings(GeneratingSettings):
    """Rejection sampling."""

    init_from: str = "grpo"
    """Model that is sampled: a stage of this run, a directory, or OWNER/NAME on the hub; with rollout.engine
    endpoint, the name of a model that the API at OPENAI_BASE_URL serves (take template boxed for most)."""
    pool: Count = 3_000
    """Problems taken from each source, train split."""
    samples: Samples = 4
    """Completions sampled a problem."""
    keep: Count = 2
    """At most this many completions are kept a problem; they differ."""
    general: Natural = 200
    """Rows of general data (no arithmetic, no code) that are added, to keep other skills alive."""
    min_language: Share = 0.99
    """Least share of words in the question's language."""
    prompts_per_step: Natural = 0
    """Problems between lines of the log; a killed run loses at most these. 0 = 500, of a served model 32."""
