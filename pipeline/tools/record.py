"""Recorded steps: `recorded-N/` in an RL stage's directory has all that the update of step N depends on.

    policy/         the policy before it, as a public checkpoint with its tokenizer
    state.pt        optimizer, guard, reference; the round of rollouts with their rewards; advantages
    config.toml     the settings, with the learning rate that rollbacks have left
    manifest.json   written last: hashes of the files, environment, the tensors' fingerprints before and after

The folder gets its name once it is complete. It is as large as a checkpoint.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from model.policy import Policy
from pipeline.errors import Stopped, UserError
from pipeline.run.checkpoint import read_manifest, steps_in, write_manifest
from pipeline.run.directory import RunDir
from pipeline.run.environment import environment
from pipeline.run.files import replacing, write_atomic
from pipeline.run.guard import Diverged
from pipeline.run.history import flat, resolved
from pipeline.run.metrics import say
from pipeline.settings.rollouts import GrpoSettings
from pipeline.table import STAGES
from pipeline.train.learner import Learner
from pipeline.train.policy import save_policy
from rollout.weights import fingerprints

RL = [stage.name for stage in STAGES if stage.settings is GrpoSettings]


@contextmanager
def recording(
    run_dir: RunDir,
    config: GrpoSettings,
    step: int,
    learner: Learner,
    tokenizer: Any,
    state: Mapping[str, Any],
) -> Iterator[None]:
    """Record the update of step `step`, which is made within it, and `state`, what it depends on beside the
    learner (nothing: do not). One that stops the run is recorded too."""
    if not state:
        yield
        return
    folder, stopped = run_dir.path / f"recorded-{step}", None
    with replacing(folder) as partial:
        partial.mkdir()
        own, before = learner.state_dict(), prints(learner.policy)
        del own["policy"]
        save_policy(learner.policy, tokenizer, partial / "policy", config.template, f"Before step {step}")
        with (partial / "state.pt").open("wb") as file:  # given a path, torch hides that the disk is full
            torch.save({**state, "learner": own}, file)
        settings = resolved(replace(config, optim=learner.optim))
        write_atomic(partial / "config.toml", tomli_w.dumps(settings))
        try:
            yield
        except (Stopped, Diverged) as error:
            stopped = error
        after = prints(learner.policy)
        write_manifest(partial, step=step, environment=here(), before=before, after=after)
    size = sum(path.stat().st_size for path in folder.rglob("*")) / 1e6
    say(f"step {step} is recorded ({size:.1f} MB): python -m pipeline replay {run_dir.path} --step {step}")
    if stopped:
        raise stopped


def prints(policy: Policy) -> dict[str, int]:
    """The fingerprint of each tensor by name."""
    state = policy.state_dict()
    return dict(zip(state, fingerprints(state.values()), strict=True))


def here() -> dict[str, Any]:
    """What bits depend on beside a record: code, packages, machine, threads."""
    found = {key: value for key, value in environment().items() if key not in ("command", "inputs")}
    return flat(found | {"threads": torch.get_num_threads()})


def load_record(run: Path, step: int) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Folder, manifest and state of a recorded step of a stage's directory; 0 = the last one.
    Raises `UserError`: not an RL stage, no such step, or a record that is damaged."""
    if run.name not in RL or not (run / "config.toml").is_file():
        raise UserError(f"{run} is no run of an RL stage, such as runs/NAME/{RL[0]} ({', '.join(RL)})")
    steps = steps_in(run, "recorded")
    if step not in (steps and [0, *steps]):
        there = f"there are: {', '.join(map(str, steps))}" if steps else "train with --record N"
        raise UserError(f"{run} has no recorded step{f' {step}' if step else 's'}; {there}")
    folder = run / f"recorded-{step or steps[-1]}"
    manifest = read_manifest(folder, way := f"rm -r {folder}, and record the step again")
    if not all(isinstance(manifest.get(part), dict) for part in ("environment", "before", "after")):
        raise UserError(f"{folder}/manifest.json is not that of a recorded step; {way}")
    return folder, manifest, torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What differs by name: before and after."""
    pairs = {name: [before.get(name), after.get(name)] for name in (*before, *after)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
