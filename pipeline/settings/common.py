"""What stages share: the run, the optimizer, sampling, and where problems come from."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from rewards.registry import own_function
from rollout.ranges import Count, Natural, NotNegative, Range, Seed, Settings, Share, Threads
from rollout.text.templates import template_named
from rollout.types import SamplingParams

COLDEST = 0.001
"""Lowest temperature above 0."""


@dataclass(frozen=True, kw_only=True)
class StageSettings(Settings):
    """What every stage has."""

    name: str = "tiny"
    """Name of the run; everything goes to RUNS/NAME/STAGE/."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    seed: Seed = 0
    """Seed of every random number; same config and seed give the same bits on a CPU."""
    resume: bool = False
    """Go on from the newest checkpoint of this run directory (or start it, when there is none)."""


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(StageSettings):
    """What every stage has that computes with our own learner or engine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where policy, reference and optimizer lie: auto = the GPU where torch finds one, else the CPU."""
    threads: Threads = 0
    """CPU threads for torch; 0 = one a core. Bits are reproducible for an equal number of threads."""


@dataclass(frozen=True, kw_only=True)
class LoggedSettings(ComputeSettings):
    """What every stage has that logs metrics."""

    tracker: Literal["", "tensorboard", "wandb", "trackio"] = ""
    """Metrics go there too: tensorboard = the stage's folder tensorboard/; wandb and trackio = project NAME,
    a run a session. `pip install` it first. metrics.jsonl is always written."""


@dataclass(frozen=True, kw_only=True)
class GuardSettings(Settings):
    """What skips an update that diverges, and goes back to a checkpoint when that does not help."""

    max_spike: NotNegative = 10.0
    """Skip an update whose gradient norm exceeds the clip and this many times the largest of the last 32;
    0 = skip none but those that are not finite. (In the tiny chain it is at most 2.3 times the largest.)"""
    max_skipped: Annotated[int, Range(1, 32)] = 5
    """Roll back when this many of the last 32 updates were skipped."""
    max_rollbacks: Natural = 2
    """Rollbacks before the run stops, counted from the last change of the learning rate at a resume."""
    rollback_lr: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.5
    """Each rollback multiplies the learning rate by this."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LoggedSettings):
    """What every stage has that trains with our own learner."""

    micro_tokens: Natural = 0
    """Most tokens of one forward and backward; a longer sequence is computed by itself. Fewer take less
    memory and give the same sum. 0 = 4,096 on a CPU, 16,384 on a GPU."""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """Against divergence."""


@dataclass(frozen=True, kw_only=True)
class TemplateSettings(Settings):
    """The prompt template: the default (`auto` in evaluations), or a name that exists."""

    template: str = "r1"
    """Prompt template, a name in `rollout.text.templates`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template != type(self).template:
            template_named(self.template)


@dataclass(frozen=True, kw_only=True)
class CodeSettings(Settings):
    """What everything has that grades programs."""

    allow_unsafe_code: bool = False
    """Run programs even where the kernel cannot confine them: without seccomp, or with neither namespaces nor
    Landlock. They may then read, change and send what you may."""


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(Settings):
    """AdamW and its schedule. Betas and decay: DeepSeek-V3, arXiv:2412.19437, Sec. 4.2."""

    lr: NotNegative = 3e-6
    """Peak learning rate (R1's RL: 3e-6). 0 = nothing is learned, for checks."""
    warmup_steps: Natural = 0
    """Optimizer updates over which the rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up, down to `min_lr_ratio` at the last update."""
    min_lr_ratio: Share = 0.1
    """Last rate as a share of the peak (cosine and linear)."""
    beta1: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    """AdamW's first-moment decay."""
    beta2: Annotated[float, Range(0, 1, open_high=True)] = 0.95
    """AdamW's second-moment decay."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay, on matrices only."""
    clip: NotNegative = 1.0
    """Largest gradient norm; 0 = no clipping."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings(AdamWSettings):
    """AdamW, its schedule, and the arithmetic of our own learner."""

    decay_steps: Natural = 0
    """Last updates over which the rate falls from its peak (warm-up-stable-decay, arXiv:2404.06395, Sec. 4);
    0 = it falls from the warm-up on."""
    router_bias_gamma: NotNegative = 0.001
    """Step of the router's balancing bias after each update (arXiv:2412.19437, Sec. 2.1.2); 0 = frozen."""
    balance_alpha: NotNegative = 0.0
    """Weight of the sequence-wise balance loss (arXiv:2412.19437, Eq. 17; the report: 1e-4); 0 = none."""
    precision: Literal["float32", "bfloat16", "fp8"] = "float32"
    """Arithmetic of forward and backward. `bfloat16` and `fp8` keep fp32 masters and leave a bf16 model;
    `fp8` has the products of linear layers and experts in blockwise FP8 too (arXiv:2412.19437, Sec. 3.3)."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """What AdamW's moments are stored in (arXiv:2412.19437, Sec. 3.3.3: bfloat16)."""
    recompute: bool = False
    """Activation checkpointing: the backward computes each layer again, which takes less memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments == "bfloat16" and self.beta2 > 0.99:
            raise ValueError(
                f"moments=bfloat16 cannot hold beta2={self.beta2}: rounding would keep the second "
                "moment from decaying. Set beta2 to 0.99 or less, or moments to float32."
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How completions are sampled: shared by RL, rejection sampling, evaluation, generate, chat and serve."""

    max_tokens: Count = 96
    """Longest completion, tokens. A longer one is cut and graded as it stands (R1-Zero: 32,768)."""
    temperature: NotNegative = 1.0
    """Divides the logits; 0 = greedy (R1-Zero: 1; R1's second RL stage: 0.7)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < COLDEST:
            right = f"0 (greedy) or at least {COLDEST}: logits overflow"
            raise ValueError(f"temperature={self.temperature} must be {right}.")

    def params(self, *, n: int = 1, seed: int = 0, max_tokens: int | None = None) -> SamplingParams:
        """The engine's parameters: `n` rollouts a prompt, at most `max_tokens` where that is less."""
        own = shared(self, SamplingParams)
        return SamplingParams(**own | {"n": n, "seed": seed, "max_tokens": max_tokens or self.max_tokens})


@dataclass(frozen=True, kw_only=True)
class TruncatedSampling(Sampling):
    """Sampling from the likeliest tokens alone. RL has none of it: the trainer scores all tokens."""

    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Sample from the smallest set of likeliest tokens with this mass; 1 = all."""
    top_k: Natural = 0
    """Sample from this many likeliest tokens; 0 = all."""


@dataclass(frozen=True, kw_only=True)
class AnswerSampling(TruncatedSampling):
    """Sampling as DeepSeek recommends it for R1 (arXiv:2501.12948, Sec. 3)."""

    max_tokens: Count = 1_024
    """Longest answer, thinking included, tokens."""
    temperature: NotNegative = 0.6
    """Divides the logits; 0 = greedy."""
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 0.95
    """Sample from the smallest set of likeliest tokens with this mass; 1 = all."""


@dataclass(frozen=True, kw_only=True)
class RowSettings(Settings):
    """How rows of problems and of worked answers are read."""

    fields: str = ""
    """Keys of rows whose shape is not known (`pipeline.data.shapes`): NAME=KEY, separated by commas, as in
    question=body,answer=meta.key. NAME: question, answer, tests, solution, completion, id, kind, language,
    subject, level, family."""
    max_bad_rows: NotNegative = 0.01
    """Rows of a source that may be unusable (damaged, no answer that can be checked): they are left out and
    counted; more are an error. Below 1 a share, which allows 3 of 6 rows and more; from 1 on a number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named_fields(self.fields)


@dataclass(frozen=True, kw_only=True)
class HeldoutSettings(Settings):
    """What everything has that trains on problems or their worked answers."""

    data: Path | None = None
    """Folder of local data files; default: the environment variable R1_DATA."""
    heldout: tuple[str, ...] = (
        *("math500", "aime24", "aime25", "amc23", "gsm8k", "olympiadbench", "minerva_math"),
        *("humaneval", "mbpp"),
    )
    """Benchmarks: what holds one of their problems, in other words around it or with other numbers too, is
    left out, generated problems apart. Those that cannot be read are named."""


@dataclass(frozen=True, kw_only=True)
class GradingSettings(TemplateSettings, RowSettings, CodeSettings):
    """What everything has that asks a model problems and grades its answers."""

    max_error_share: Share = 0.5
    """Stop, with exit code 3, when the verifier failed for a larger share of the rollouts of two steps in a
    row, or of a benchmark; 1 = never."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentSettings(CodeSettings):
    """What answers a model's turns, in RL and in evaluations."""

    environment: str = ""
    """What answers the model's turns (`pipeline.environments`): `python`, a tool that runs its programs;
    `verifiers:NAME`, of that package; or "module:function" for your own. Empty = a rollout is one turn. Its
    own score is a reward of RL; evaluations grade the answer."""
    max_turns: Annotated[int, Range(2)] = 4
    """Turns after which a rollout that its environment has not ended is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if ":" in self.environment and not self.environment.startswith("verifiers:"):
            own_function(self.environment, "environment")
        elif ":" not in self.environment and self.environment not in ("", "python"):
            there = 'there are python, verifiers:NAME and "module:function"'
            raise ValueError(f"no environment {self.environment!r}; {there}.")
        if not self.environment and self.max_turns != 4:
            raise ValueError("max_turns has no effect without an environment: set environment, too.")


def named_fields(text: str) -> dict[str, str]:
    """`question=body,answer=key` by name; `ValueError` where a name is none of `RowSettings.fields`."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    named = {name.strip(): key.strip() for name, _, key in pairs}
    names = ["question", "answer", "tests", "solution", "completion", "id", "kind", "language"]
    names += ["subject", "level", "family"]
    if not named.keys() <= set(names) or not all(named.values()):
        raise ValueError(f"fields={text!r}: write NAME=KEY, with a name of: {', '.join(names)}.")
    return named


def shared(settings: Settings, other: type) -> dict[str, Any]:
    """Values by name of the settings that the dataclass `other` has as fields too."""
    names = [field.name for field in dataclasses.fields(other)]
    return {name: getattr(settings, name) for name in names if hasattr(settings, name)}


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain values, `None` left out, for TOML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items() if inner is not None}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    out: dict[str, Any] = plain(dataclasses.asdict(settings))
    return out
