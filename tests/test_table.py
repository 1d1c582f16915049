"""Stage table, settings, --help, configs, README and CI agree (and the Makefile: tests/test_makefile.py)."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.arguments import known_flags, load
from pipeline.table import COMMANDS, STAGES

ROOT = Path(__file__).parent.parent
TABLE = {stage.name: stage for stage in STAGES}
CONFIGS = sorted(ROOT.glob("configs/*/*.toml"))

# ---- the stage table


def test_the_table_is_in_order_and_names_what_exists():
    seen: set[str] = set()
    for stage in STAGES:
        assert set(stage.after) <= seen, f"{stage.name} comes before something that it needs"
        seen.add(stage.name)
    assert len(seen) == len(STAGES) and not seen & {command.name for command in COMMANDS}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_defines_config_and_run(stage):
    module = import_module(stage.module)
    assert dataclasses.is_dataclass(stage.settings) and stage.settings.__dataclass_params__.frozen
    assert callable(module.run)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_preset_file_is_a_valid_config(file):
    stage = TABLE.get(file.stem)
    assert stage, f"{file.name}: no such stage"
    assert load(stage, file, [])


def test_every_toml_of_the_repository_is_looked_at():
    skip = {"runs", "build"}
    found = [f for f in ROOT.rglob("*.toml") if not any(p in skip or p.startswith(".") for p in f.parts)]
    assert {f.relative_to(ROOT).as_posix() for f in found} == {
        "pyproject.toml",
        *(f.relative_to(ROOT).as_posix() for f in CONFIGS),
    }


# ---- help


def fields(config: type) -> Iterator[tuple[str, bool]]:
    """Every setting of a config, with whether a docstring stands under it."""
    documented: set[str] = set()
    for base in config.__mro__[:-1]:
        tree = ast.parse(Path(sys.modules[base.__module__].__file__ or "").read_text(encoding="utf-8"))
        body = next(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == base.__name__)
        for node, after in zip(body, [*body[1:], None], strict=True):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                documented.add(node.target.id)
    for field in dataclasses.fields(config):
        yield field.name, field.name in documented
        inner = field.default_factory() if callable(field.default_factory) else None
        if dataclasses.is_dataclass(inner):
            yield from fields(type(inner))


HELP = """
import contextlib, sys
{planted}
from pipeline.__main__ import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
slow = {{"torch", "transformers", "datasets", "trl", "sympy", "matplotlib"}} & set(sys.modules)
sys.exit(f"imported {{slow}}" if slow else 0)
"""


def show_help(*args: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ARGS` in a process of its own, which fails where it imported a slow package."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", HELP.format(planted=planted), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("entry", [*STAGES, *COMMANDS], ids=lambda e: e.name)
def test_help_shows_every_setting_at_once(entry):
    done = show_help(entry.name, "--help")
    assert done.returncode == 0, done.stderr
    positional = (
        ("stages", "source", "out", "first", "second", "folder", "path")
        if getattr(entry, "positional", False)
        else ()
    )
    needed = {f"--{name}" for name in positional}
    missing = [flag for flag in known_flags(entry.settings) if flag not in done.stdout and flag not in needed]
    assert not missing, f"--help of {entry.name} leaves out {missing}"
    assert not [name for name, documented in fields(entry.settings) if not documented]
    text = " ".join(re.sub("[│─]", " ", done.stdout).split())
    if "--resume" in text:  # inherited, so the docstring comes from the parent class
        assert "Go on from the newest checkpoint" in text


def test_help_that_imports_a_slow_package_is_noticed():
    done = show_help("pretrain", "--help", planted="import sympy")
    assert done.returncode == 1 and "imported {'sympy'}" in done.stderr


def test_the_list_of_stages_and_commands_imports_nothing_slow():
    done = show_help("--help")
    assert done.returncode == 0, done.stderr
    assert all(entry.name in done.stdout for entry in (*STAGES, *COMMANDS))


# ---- README and CI


def test_readme_names_stages_targets_and_presets():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for stage in STAGES:
        assert re.search(rf"\bmake {stage.name}\b", text), f"README does not show `make {stage.name}`"
    for target in ("r1", "test", "check", "help"):
        assert re.search(rf"\bmake {target}\b", text), f"README does not show `make {target}`"
    for preset in {file.parent.name for file in CONFIGS}:
        assert f"configs/{preset}" in text or f"PRESET={preset}" in text, (
            f"README does not name preset {preset}"
        )
    known = {*TABLE, "r1", "setup", "check", "test", "test-vllm", "bench", "gpu-check", "help", "STAGE"}
    for target in re.findall(r"^(?:\$ )?make ([a-z0-9-]+)\b", text, re.M):
        assert target in known, f"README shows `make {target}`, which the Makefile does not have"


def test_ci_runs_check_and_test():
    script = ROOT / ".ci/run"
    text = script.read_text()
    assert os.access(script, os.X_OK) and "set -euo pipefail" in text
    for target in ("check", "test", "test-vllm"):
        assert re.search(rf"^make {target}(?: #.*)?$", text, re.M), f".ci/run does not run make {target}"
