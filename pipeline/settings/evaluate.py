"""Settings of the stages `eval` and `report`, and of the commands
`evaluate` (one model on one benchmark), `compare` and `leaderboard`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pipeline.settings.common import (
    AnswerSampling,
    ComputeSettings,
    EnvironmentSettings,
    GradingSettings,
    StageSettings,
    TruncatedSampling,
)
from pipeline.settings.tools import ModelSettings
from rollout.ranges import MOST_SAMPLES, Count, Natural, NotNegative, Range, Samples, Seed, Settings
from rollout.settings import DtypeName, EngineName, VllmSettings

LABELLED = r"\w[\w.-]*=.+"
"""LABEL=...; the label becomes a folder."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(TruncatedSampling, EnvironmentSettings, GradingSettings):
    """What stage and command have in common."""

    samples: Annotated[int, Range(0, MOST_SAMPLES)] = 0
    """Completions per problem, k. 0 = 1 where temperature is 0; else 4 to 64 by the size of the set
    (arXiv:2501.12948, Sec. 3): AIME 64, AMC 32, HumanEval 8, other benchmarks 4, own sets the power of two
    that makes at most 2,000 completions."""
    template: str = "auto"
    """Prompt template. auto = the one the model was trained with, if its pipeline.json has it; else boxed if
    the tokenizer has a chat template (boxed-think if that knows thinking and leaves the tag to the model),
    else raw, or qa with `shots`."""
    shots: Annotated[int, Range(0, 64)] = 0
    """Worked examples before each question, for base models; a reasoning model does better without any
    (arXiv:2501.12948, Sec. 5). Earlier turns of a chat, or text that ends where the next question begins."""
    shots_from: str = ""
    """Where they come from: problems with a worked solution, as `benchmark`. Empty = the benchmark's own
    training set (gsm8k: gsm8k_train; math500: math_train)."""
    corpus: tuple[str, ...] = ()
    """What the model was trained on: files of rows or of problems, hub:OWNER/NAME:SPLIT, or (in the stage)
    stages of the run. Questions that are copies or near copies of its own are counted, and scored apart."""
    save_every: Samples = 256
    """Completions that are generated together, graded and saved; a killed run loses at most these. Their
    rounding depends on their company, so a folder keeps it. The engine waits for the longest of them: for
    long completions more are faster (tiny model, 1,280 completions: 256 take 5 % more than all, 64 79 %).
    Of an endpoint each question is saved."""
    workers: Annotated[int, Range(0, 4_096)] = 0
    """Engines in processes of their own, on Ray (extra `cluster`), each with `threads` threads and, where the
    device is a GPU, a GPU of its own; any number gives the same bytes. 0 = one engine in this process."""
    data: Path | None = None
    """Folder of the benchmarks' files; default $R1_DATA, then the hub."""
    max_batch: Natural = 0
    """Completions that are generated side by side; 0 = the engine's own default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.environment and self.workers:
            raise ValueError(f"workers={self.workers} must be 0 with an environment.")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(BenchmarkSettings, ComputeSettings):
    """Score every model of the chain on every benchmark."""

    models: tuple[str, ...] = (
        "base=pretrain",
        "zero=zero",
        "dev1=sft",
        "dev2=grpo",
        "dev3=sft2",
        "r1=grpo2",
        "student=distill/student",
        "student_plain=distill/plain",
    )
    """LABEL=STAGE, LABEL=STAGE/PART, LABEL=MODEL_DIRECTORY or LABEL=OWNER/NAME (on the hub) each."""
    benchmarks: tuple[str, ...] = ("heldout=generator:tiny",)
    """NAME or LABEL=SOURCE each; an error if one cannot be read."""
    extra_benchmarks: tuple[str, ...] = ("math500", "aime24")
    """Likewise, but listed as not scored, with the reason, where their data cannot be read."""
    heldout_count: Count = 320
    """Problems of a generator."""
    heldout_seed: Seed = 1
    """Of a generator's problems; the same for all runs, whatever their seed, so that runs compare."""
    extra_limit: Natural = 20
    """At most this many problems of each extra benchmark, from its start; 0 = all."""
    temperature: NotNegative = 0.0
    """Divides the logits; 0 = greedy. The paper: 0.6 with several samples (arXiv:2501.12948, Sec. 3)."""
    max_tokens: Count = 256
    """Longest completion, tokens; less where the model's context ends."""
    engine: EngineName = "auto"
    """auto = native for DeepSeek-V3 checkpoints, dense (transformers) for all others."""
    dtype: DtypeName = "float32"
    """Of the weights and the arithmetic."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """vLLM's own settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models or not self.benchmarks:
            raise ValueError("models and benchmarks need at least one entry each.")
        if self.engine == "endpoint":
            raise ValueError("engine=endpoint scores one served model: use the command evaluate.")
        for entry in self.models:
            if not re.fullmatch(LABELLED, entry):
                raise ValueError(f"models: {entry!r} must read LABEL=STAGE or LABEL=MODEL_DIRECTORY.")
        labels = [entry.partition("=")[0] for entry in self.models]
        if twice := next((label for label in labels if labels.count(label) > 1), ""):
            raise ValueError(f"models: two are called {twice!r}; give one of them another label.")
        for entry in self.benchmarks + self.extra_benchmarks:
            if "=" in entry and not re.fullmatch(LABELLED, entry):
                raise ValueError(f"benchmarks: {entry!r} must read NAME or LABEL=SOURCE.")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(AnswerSampling, BenchmarkSettings, ModelSettings):
    """Score one checkpoint on one benchmark."""

    benchmark: str
    """math500, aime24, aime25, gsm8k, humaneval, mbpp, ..., heldout, generator:TASK, hub:OWNER/NAME:SPLIT, or
    a FILE.jsonl."""
    out: Path
    """Folder for generations.jsonl and scores.json; new, or of this same evaluation, which then goes on."""
    limit: Annotated[int, Range(1)] | None = None
    """At most this many problems, from the start; of a generator, how many (default 320)."""
    max_tokens: Count = 32_768
    """Longest completion, tokens; less where the model's context ends."""
    seed: Seed = 0
    """Of the sampling."""
    problems_seed: Seed = 1
    """Of a generator's problems."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers and self.engine == "endpoint":
            raise ValueError(f"workers={self.workers} must be 0 with an endpoint: set endpoint.in_flight.")
        if self.environment and self.engine == "endpoint":
            raise ValueError("environment needs the model's tokens, which an endpoint does not return.")


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """Compare two evaluations of one benchmark, question by question."""

    first: Path
    """A: the --out folder of `evaluate`, or runs/NAME/eval/LABEL/BENCHMARK."""
    second: Path
    """B: another, of the same problems and as many samples of each."""
    out: Path | None = None
    """A page, FILE.html, with the questions that changed, and both models' transcripts side by side."""


@dataclass(frozen=True, kw_only=True)
class LeaderboardSettings(Settings):
    """A table of all evaluations below a folder."""

    folder: Path
    """A run, the folder of all runs, or any that has `--out` folders of `evaluate` below it."""
    out: Path | None = None
    """The table as a page, FILE.html."""
    json: Path | None = None
    """The scores in the shape of lm-evaluation-harness's results, an object for each model by its path."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(StageSettings):
    """Write summary.json and report.html of a run."""

    transcripts: Natural = 4
    """Held-out problems whose completions are shown side by side, evenly spaced through the set."""
    transcript_models: tuple[str, ...] = ("base", "zero", "r1")
    """Labels of the models whose completions are shown."""
