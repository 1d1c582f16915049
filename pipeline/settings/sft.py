"""Settings of the stages `sft` and `sft2`."""

from dataclasses import dataclass, field

from pipeline.settings.common import OptimSettings, StageSettings, TemplateSettings
from rollout.ranges import Count, Natural, NotNegative


@dataclass(frozen=True, kw_only=True)
class SftSettings(TemplateSettings, StageSettings):
    """SFT on completions; prompts have no weight. Cosine to a tenth (arXiv:2501.12948, appendix)."""

    init_from: str = "pretrain"
    """Model to start from: a stage of this run, or a directory."""
    corpus: str = ""
    """JSONL corpus: a stage of this run that leaves one (`reject`), or a file; empty = none."""
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
    rows: Count = 8
    """Packed rows an update."""
    row_tokens: Count = 256
    """Tokens of a packed row."""
    micro_rows: Count = 32
    """Rows of one forward and backward."""
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
