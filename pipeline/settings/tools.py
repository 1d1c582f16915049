"""Settings of the commands beside the chain: up, grade, generate, chat, serve."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pipeline.settings.common import AnswerSampling, CodeSettings, TruncatedSampling
from rollout.ranges import Count, Natural, Range, Samples, Seed, Settings, Threads
from rollout.settings import DtypeName, EndpointSettings, EngineName, LocalSettings, VllmSettings


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model, and how it is opened."""

    model: Path
    """Checkpoint directory: config.json, safetensors, and for text a tokenizer; or a served model's name."""
    engine: EngineName = "auto"
    """auto = native for DeepSeek-V3 checkpoints, dense (transformers) for all others; vllm in .venv-vllm;
    endpoint = `model` is a name that the API at OPENAI_BASE_URL serves (evaluate, generate)."""
    dtype: DtypeName = "float32"
    """Of the weights and the arithmetic."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one. vLLM takes what its build is for."""
    threads: Threads = 0
    """CPU threads for torch; 0 = torch's own choice."""
    local: LocalSettings = field(default_factory=LocalSettings)
    """Settings of the native and the dense engine."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """vLLM's own settings."""
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    """Settings of engine endpoint."""


@dataclass(frozen=True, kw_only=True)
class UpSettings(Settings):
    """Make stages and, first, the stages that they need and that are not made yet. Every other --key value
    goes to the named stages alone. After Ctrl-C the running stages finish their step and save; after a
    failure they finish. No other starts, and the command that goes on from there is shown."""

    stages: tuple[str, ...]
    """Stages by name; `r1` or `all` = the complete preset."""
    preset: str = ""
    """Folder of configs/ with a TOML file for each stage; empty = tiny, or smollm2 for the stage smollm2."""
    name: str = ""
    """Name of the run; empty = the preset's. Holds, like seed and runs, for the needed stages too."""
    seed: Seed | None = None
    """Seed of the run; None = that of each config."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    jobs: Natural = 0
    """Stages side by side, their lines with the name in front. Each uses every core, or its `threads`. 0 = 2
    where two of them can, all have threads = 1, and there are two cores; else 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise ValueError("up needs a STAGE, such as: python -m pipeline up r1.")
        preset = self.preset or ("smollm2" if "smollm2" in self.stages else "tiny")
        object.__setattr__(self, "preset", preset)
        object.__setattr__(self, "name", self.name or preset)
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name={self.name!r} must be letters, digits and . _ - (it becomes a folder).")


@dataclass(frozen=True, kw_only=True)
class GradeSettings(CodeSettings):
    """Grade the completions of a JSONL file, or again those of an evaluation, without its model."""

    source: Path
    """The folder of a complete evaluation; or lines with `completion`, and `answer` (mathematics) or `tests`
    (code: Python statements, or objects with `input` and `output`; `shown` of them, by default all, stand in
    the question), or with the keys of a public data set (`pipeline.data.shapes`)."""
    out: Path
    """A new folder, with scores.json; or the same lines with `verdict`, `extracted` and `detail`, replaced
    where they exist."""
    kind: Literal["math", "code", "general"] | None = None
    """What the completions are; by default code where a line has `tests`, else mathematics."""
    mode: Literal["lenient", "strict"] = "lenient"
    """How the final answer is looked for: lenient to evaluate, strict as in training."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(TruncatedSampling, ModelSettings):
    """Generate completions from a checkpoint. A tokenizer is needed for text prompts only."""

    prompts: Path
    """JSON lines: {"prompt": text}, taken as it is, or {"token_ids": [..]}."""
    out: Path
    """Where the rollouts go, in order: index, sample, token_ids, logprobs, text, finish_reason."""
    samples: Samples = 1
    """Rollouts per prompt."""
    max_tokens: Count = 256
    """Longest completion, tokens."""
    seed: Seed = 0
    """Same seed, prompts and weights give the same rollouts."""
    ignore_eos: bool = False
    """Never stop before max_tokens (for benchmarks)."""
    min_tokens: Natural = 0
    """Nothing ends a completion before this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, each kept at its end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}.")
        if not all(self.stop):
            raise ValueError(f"stop={self.stop!r} must hold strings, none of them empty.")


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """Say what is wrong with a run of RL: examine its rollouts and metrics, or a dump of another trainer.
    Each finding has its evidence and what to do. The last line is JSON."""

    path: Path
    """Folder of a stage's run, or a dump: JSON lines or parquet of ours, TRL (log_completions) or verl
    (rollout_data_dir), a file or a folder of them."""
    model: Path | None = None
    """Checkpoint directory whose tokenizer shows faults of tokens, end tokens and templates; None = these are
    not looked for."""
    data: Path | None = None
    """Folder of the benchmarks' files, for contamination; default: the environment variable R1_DATA, without
    which it is not looked for."""


@dataclass(frozen=True, kw_only=True)
class ChatSettings(AnswerSampling, ModelSettings):
    """Talk to a model. An empty line or Ctrl-D ends it, /new begins a new conversation."""

    seed: Seed = 0
    """Of the sampling; each turn has its own."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings(AnswerSampling, ModelSettings):
    """Serve a model. --engine auto takes vLLM, with its own server and defaults, where it is installed.
    max_tokens, temperature, top_p and top_k hold for requests without a value of their own."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all of this machine's."""
    port: Annotated[int, Range(0, 65_535)] = 8000
    """Port; 0 = any that is free."""
    name: str = ""
    """The model's name in requests; empty = the directory's."""
    api_key: str = field(default="", repr=False)
    """What a client must send as its key; empty = R1_API_KEY of the environment, or else none. Other users of
    the machine can read a command line, but not its environment."""
    max_requests: Annotated[int, Range(1, 512)] = 256
    """Requests that are generated or wait at once; a further one gets the status 429. vLLM's has no limit."""
    timeout_s: Count = 60
    """Seconds for a client to send a request, or to read a part of the answer; then it is dropped (not by
    vLLM's server)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host:
            raise ValueError("host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 all its addresses.")
        if not re.fullmatch(r"[!-~]*", self.api_key):
            raise ValueError("api_key must be printable ASCII without spaces.")
