"""A toy stage, and what the tests of the run directory do to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pipeline.errors import UserError
from pipeline.settings.common import OptimSettings, StageSettings
from pipeline.table import Stage

COMMAND = "python -m pipeline toy --config toy.toml"


@dataclass(frozen=True, kw_only=True)
class ToySettings(StageSettings):
    """A toy stage."""

    steps: int = 3
    """Steps."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """Optimizer."""


TOY = Stage("toy", ToySettings, "toy_stage", "a toy")


def refusal(context):
    """The one line with which opening is refused."""
    with pytest.raises(UserError) as error, context:
        pytest.fail("the directory was opened")
    assert "\n" not in str(error.value)
    return str(error.value)


def save(run, step, text="state"):
    run.checkpoint(
        step, lambda folder: [(folder / f"{n}.bin").write_text(f"{text} {n} {step}") for n in "ab"]
    )


def begun_with_checkpoints(opened, *steps):
    with pytest.raises(RuntimeError), opened() as run:
        for step in steps:
            run.log(step, 10, {"loss/lm": float(step)})
            save(run, step)
        raise RuntimeError
    return run
