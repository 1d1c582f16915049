"""Settings of stage `reject`."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.settings.common import Sampling, StageSettings, TemplateSettings
from rollout.ranges import Count, Natural, Share
from rollout.settings import RolloutSettings


@dataclass(frozen=True, kw_only=True)
class RejectSettings(TemplateSettings, Sampling, StageSettings):
    """Rejection sampling."""

    init_from: str = "grpo"
    """Model that is sampled: a stage of this run, or a directory."""
    problems: tuple[str, ...] = ("generator:tiny",)
    """Problem sources, as in the RL stages; train split."""
    pool: Count = 3_000
    """Problems taken from each source."""
    data: Path | None = None
    """Folder of local data files; default: the environment variable R1_DATA."""
    samples: Count = 4
    """Completions sampled a problem."""
    keep: Count = 2
    """At most this many completions are kept a problem; they differ."""
    general: Natural = 200
    """Rows of general data (no arithmetic, no code) that are added, to keep other skills alive."""
    min_language: Share = 0.99
    """Least share of words in the question's language."""
    prompts_per_step: Count = 500
    """Problems between lines of the log; a killed run loses at most these."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """The engine that generates, in this process or in workers."""
