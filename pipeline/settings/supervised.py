"""Settings of the supervised stages `pretrain`, `student`, `sft` and `sft2`."""

from dataclasses import dataclass, field
from typing import Annotated

from pipeline.settings.common import (
    HeldoutSettings,
    OptimSettings,
    RowSettings,
    TemplateSettings,
    TrainSettings,
)
from rollout.ranges import Count, Natural, NotNegative, Positive, Range, Settings, Share


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings(TrainSettings):
    """What they have in common."""

    batch_tokens: Count
    """Tokens an update, at most."""
    max_length: Annotated[int, Range(2)]
    """Longest sequence, tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length > self.batch_tokens:
            raise ValueError(f"max_length={self.max_length} exceeds batch_tokens={self.batch_tokens}.")


@dataclass(frozen=True, kw_only=True)
class StopSettings(Settings):
    """When a policy has learned enough: its rate then decays over `optim.decay_steps`, and the stage ends."""

    loss: NotNegative = 0.0
    """Loss at which the decay begins, nats a token, on the solutions of worked held-out documents: chance
    decides nothing in them, so a policy that can work a problem is near 0. 0 = no rule: all `steps`."""
    every: Count = 50
    """Updates between two looks at that loss."""
    documents: Count = 64
    """Held-out documents, the same each time."""


@dataclass(frozen=True, kw_only=True)
class DocumentSettings(SupervisedSettings):
    """Pretraining from scratch on generated documents."""

    task: str = "tiny"
    """Mixture or family of `pipeline.data.generators` that the documents are about; train split only."""
    pool: Count = 20_000
    """Different problems that the documents are about."""
    steps: Count = 2_200
    """Optimizer updates, at most."""
    stop: StopSettings = field(default_factory=StopSettings)
    """When fewer are enough."""
    batch_tokens: Count = 1_024
    """Tokens an update, at most."""
    max_length: Annotated[int, Range(2)] = 128
    """Longest document, tokens; a longer one is cut."""
    hidden_size: Count = 128
    """Width of the model."""
    num_hidden_layers: Count = 3
    """Layers; the first of an MoE is dense."""
    num_attention_heads: Count = 4
    """Attention heads."""
    initializer_range: Positive = 0.05
    """Standard deviation of the initial weights. The report has 0.006 for a width of 7,168."""
    log_every: Count = 50
    """Steps between lines of the log."""
    checkpoint_every: Count = 400
    """Steps between checkpoints."""
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            lr=1e-3, warmup_steps=30, schedule="cosine", router_bias_gamma=0.003
        )
    )
    """AdamW, schedule and router balancing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop.loss and self.optim.schedule != "constant" and not self.optim.decay_steps:
            raise ValueError("stop.loss needs optim.decay_steps: updates in which the rate falls at the end.")


@dataclass(frozen=True, kw_only=True)
class MtpSettings(Settings):
    """Multi-token prediction (arXiv:2412.19437, Sec. 2.2 and 4.2)."""

    mtp_coef: NotNegative = 0.3
    """Weight of its loss (the report: 0.3, later 0.1)."""
    mtp_coef_late: NotNegative = 0.1
    """Its weight from the share `mtp_late_from` of the updates on."""
    mtp_late_from: Share = 0.68
    """When the later weight begins, share of the updates (the report: 10 of 14.8T tokens); 1 = never."""


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(MtpSettings, DocumentSettings):
    """Next-token and multi-token prediction on generated documents (arXiv:2412.19437, Sec. 2.2 and 4)."""

    vocab_size: Annotated[int, Range(265)] = 640
    """Entries of the byte-level BPE that is trained on the corpus: bytes, special tokens and tags are 265."""
    n_routed_experts: Count = 8
    """Routed experts a layer; 2 are chosen a token, 1 is shared."""
    moe_intermediate_size: Count = 64
    """Width of an expert."""


@dataclass(frozen=True, kw_only=True)
class StudentSettings(DocumentSettings):
    """Pretraining of a small dense student, a Llama (arXiv:2302.13971), so that it can read before it is
    taught, as R1's students could. Student and control start from it."""

    tokenizer_from: str = "pretrain"
    """Stage of this run, or directory, whose tokenizer the student takes."""
    intermediate_size: Count = 384
    """Width of the gated feed-forward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (2 * self.num_attention_heads):
            heads = f"num_attention_heads={self.num_attention_heads}"
            raise ValueError(f"hidden_size={self.hidden_size} is no even multiple of {heads}.")


@dataclass(frozen=True, kw_only=True)
class SftSettings(TemplateSettings, RowSettings, HeldoutSettings, SupervisedSettings):
    """SFT on completions; prompts have no weight. Cosine to a tenth (arXiv:2501.12948, appendix)."""

    init_from: str = "pretrain"
    """Model to start from: a stage of this run, a directory, or OWNER/NAME on the hub."""
    corpus: str = ""
    """Worked answers: a stage of this run that leaves a corpus (`reject`), a JSONL file, or public traces,
    `hub:OWNER/NAME[:CONFIG]:SPLIT`; empty = none."""
    count: Natural = 0
    """At most this many rows of the corpus, sampled at random by `seed`; 0 = all."""
    curated: Natural = 0
    """Curated worked traces to generate (cold start)."""
    curated_task: str = "tiny"
    """What they are about, a mixture or family of `pipeline.data.generators`; train split only."""
    samples_from: str = ""
    """RL stage of this run whose right and readable samples join the corpus (`zero`); empty = none."""
    max_samples: Natural = 0
    """At most this many of those samples, the latest first; 0 = all."""
    epochs: Count = 2
    """Passes over the corpus (R1: 2)."""
    batch_tokens: Count = 2_048
    """Tokens an update, at most."""
    max_length: Annotated[int, Range(2)] = 256
    """Longest prompt plus completion, tokens; a longer row is left out and counted."""
    mtp_coef: NotNegative = 0.1
    """Weight of the multi-token-prediction loss (arXiv:2412.19437, Sec. 4.2: 0.1 late in training)."""
    log_every: Count = 5
    """Steps between lines of the log."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    story: str = "SFT model"
    """Title of the model card."""
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=5e-5, schedule="cosine"))
    """AdamW and its schedule (R1: 5e-5 to 5e-6)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.corpus or self.curated or self.samples_from):
            raise ValueError("nothing to train on: set corpus, curated or samples_from.")
