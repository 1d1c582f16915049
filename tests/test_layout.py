"""The layout holds together: imports point one way, files stay small, stage table, help, configs and README
tell the same story (so does the Makefile: tests/test_makefile.py).
"""

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
PACKAGES = ("rollout", "model", "rewards", "pipeline", "distill")
TABLE = {stage.name: stage for stage in STAGES}
CONFIGS = sorted(ROOT.glob("configs/*/*.toml"))

# ---- imports


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, inside functions too; `from a import b` counts as `a` and `a.b`."""
    package = file.relative_to(ROOT).parent.as_posix().replace("/", ".")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def sources() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def outside(file: Path) -> set[str]:
    """Top-level names that a file imports, less the standard library."""
    return {name.partition(".")[0] for name in imports(file)} - set(sys.stdlib_module_names)


def test_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "model" / "kernels").mkdir(parents=True)
    file = tmp_path / "model" / "kernels" / "a.py"
    file.write_text("import a.b\nfrom . import c\nfrom ..moe import d\ndef f():\n    from e.f import g\n")
    got = set(imports(file))
    assert {"a.b", "model.kernels.c", "model.moe", "model.moe.d", "e.f", "e.f.g"} <= got


MAY_SEE = {
    "model": {"model"},
    "rewards": {"rewards", "rollout"},
    "rollout": {"rollout", "model"},
    "pipeline": {"pipeline", "rewards", "rollout", "model"},
    "distill": set(PACKAGES),
}


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    package, name = file.relative_to(ROOT).parts[0], file.relative_to(ROOT).as_posix()
    ours = outside(file) & set(PACKAGES)
    assert ours <= MAY_SEE[package], f"{name} imports {ours - MAY_SEE[package]}"
    if package == "rewards":
        seen = {n for n in imports(file) if n.startswith("rollout.")}
        assert all(n.startswith("rollout.types") for n in seen), f"{name} imports {seen}"
    if package == "model":
        allowed = {"model", "torch", "safetensors", "numpy"} | (
            {"transformers"} if name == "model/dense.py" else set()
        )
        allowed |= {"triton"} if "kernels" in file.parts else set()
        assert outside(file) <= allowed, f"{name} imports {outside(file) - allowed}"
    if name == "rollout/types.py":
        assert not outside(file), f"{name} imports {outside(file)}"
    if not name.startswith("rollout/vllm/"):
        assert "vllm" not in outside(file), f"{name}: only rollout/vllm/ imports vllm"


@pytest.mark.parametrize(
    "file",
    [*sources(), *sorted((ROOT / "tests").rglob("*.py"))],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_files_hold_one_idea(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


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
import contextlib, io, sys
from pipeline.__main__ import main
with contextlib.suppress(SystemExit):
    main([sys.argv[1], "--help"])
slow = {"torch", "transformers", "datasets", "trl", "sympy", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {slow}" if slow else 0)
"""


@pytest.mark.parametrize("entry", [*STAGES, *COMMANDS], ids=lambda e: e.name)
def test_help_shows_every_setting_at_once(entry):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", HELP, entry.name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    positional = ("stages", "source", "out") if getattr(entry, "positional", False) else ()
    needed = {f"--{name}" for name in positional}
    missing = [flag for flag in known_flags(entry.settings) if flag not in done.stdout and flag not in needed]
    assert not missing, f"--help of {entry.name} leaves out {missing}"
    assert not [name for name, documented in fields(entry.settings) if not documented]
    text = " ".join(re.sub("[│─]", " ", done.stdout).split())
    if "--resume" in text:  # inherited, so the docstring comes from the parent class
        assert "Go on from the newest checkpoint" in text


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
