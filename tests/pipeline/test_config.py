"""Configs: what wins, what is refused and how it says so, and that a resolved config reads back."""

from __future__ import annotations

import dataclasses
import math
import sys
import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pipeline import arguments as configs
from pipeline.arguments import OptimConfig, StageConfig, flags, parse, read_toml, to_dict, to_toml
from pipeline.errors import UserError
from pipeline.table import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(StageConfig):
    """A stage's config with a field of each kind."""

    group_size: int = 16
    """Rollouts per prompt."""
    kind: Literal["math", "code"] = "math"
    """Of problem."""
    init_from: Path = Path("pretrain")
    """Model."""
    sizes: tuple[int, ...] = (1, 2)
    """Some numbers."""
    note: str | None = None
    """Free text."""
    mtp: bool = True
    """A switch that is on."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3))
    """Optimizer."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be at least 2.")


STAGE = Stage("toy", "toy_stage", "a toy")


@pytest.fixture(autouse=True)
def toy_stage(monkeypatch):
    """A module with `Config`, as the stage table names them."""
    module = types.ModuleType("toy_stage")
    module.Config = Config
    monkeypatch.setitem(sys.modules, "toy_stage", module)


def load(tmp_path, toml, *overrides):
    file = tmp_path / "toy.toml"
    file.write_text(toml, encoding="utf-8")
    return configs.load(STAGE, file, list(overrides))


def refused(tmp_path, toml, *overrides):
    """The error's text, which must be one line."""
    with pytest.raises(UserError) as error:
        load(tmp_path, toml, *overrides)
    text = str(error.value)
    assert "\n" not in text and not set("│╭╰─") & set(text), text
    return text


def test_defaults_then_file_then_flags(tmp_path):
    assert load(tmp_path, "") == Config()
    toml = 'group_size = 8\nkind = "code"\nmtp = false\nsizes = [3]\n[optim]\nlr = 0.5\nbeta1 = 0.8\n'
    got = load(tmp_path, toml, "--group-size", "4", "--optim.lr=0.25", "--resume")
    want = Config(
        group_size=4, kind="code", mtp=False, sizes=(3,), resume=True, optim=OptimConfig(lr=0.25, beta1=0.8)
    )
    assert got == want
    assert load(tmp_path, toml, "--mtp", "--group_size", "5", "--group-size", "6").group_size == 6
    assert load(tmp_path, toml, "--mtp").mtp is True


def test_a_nested_default_of_the_stage_survives_an_override_beside_it(tmp_path):
    got = load(tmp_path, "", "--optim.beta1", "0.5")
    assert got.optim == OptimConfig(lr=1e-3, beta1=0.5)  # not OptimConfig's own lr


@pytest.mark.parametrize(
    ("toml", "overrides", "says"),
    [
        ("group_sise = 8", [], ["--group-sise", "did you mean --group-size?", "toy.toml"]),
        ("[optim]\nlearning_rate = 1.0", [], ["--optim.learning-rate", "--optim."]),
        ("[optm]\nlr = 1.0", [], ["--optm.lr", "did you mean --optim.lr?"]),
        ("", ["--sede", "1"], ["--sede", "did you mean --seed?", "python -m pipeline toy"]),
        ("", ["--zzzzzz=1"], ["--zzzzzz", "--help"]),
        ('group_size = "many"', [], ["--group-size", "'many'", "INT"]),
        ("group_size = 1.5", [], ["--group-size", "'1.5'", "INT"]),
        ("", ["--optim.lr", "fast"], ["--optim.lr", "'fast'", "FLOAT"]),
        ("", ["--kind", "cod"], ["--kind", "'cod'", "did you mean code?"]),
        ("", ["--group-size"], ["--group-size", "Missing value"]),
        ("", ["--mtp", "yes"], ["yes"]),
        ("", ["stray"], ["stray"]),
        ("group_size = 1", [], ["group_size=1 must be at least 2."]),
        ("", ["--optim.lr", "-1"], ["optim.lr=-1.0 must be above 0."]),
        ("", ["--optim.min-lr-ratio", "2"], ["optim.min_lr_ratio=2.0 must be in [0, 1]."]),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(tmp_path, toml, overrides, says):
    text = refused(tmp_path, toml, *overrides)
    assert all(part in text for part in says), text
    assert "Error parsing" not in text


def test_a_required_setting_that_is_missing(tmp_path, monkeypatch):
    bare = dataclasses.make_dataclass(
        "Config", [("model", Path)], bases=(StageConfig,), frozen=True, kw_only=True
    )
    monkeypatch.setattr(sys.modules["toy_stage"], "Config", bare)
    assert "--model" in refused(tmp_path, "")


def test_malformed_toml_names_file_and_line(tmp_path):
    text = refused(tmp_path, "seed = 1\ngroup_size = = 2\n")
    assert "toy.toml" in text and "line 2" in text


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "grpo.toml").touch()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"has: bytes\.toml, grpo\.toml"):
        read_toml(tmp_path / "gpro.toml")
    with pytest.raises(UserError, match=r"bytes\.toml is not a TOML file"):
        read_toml(tmp_path / "bytes.toml")
    with pytest.raises(UserError, match="is not a TOML file"):
        read_toml(tmp_path)
    presets = tmp_path / "presets"
    (presets / "tiny").mkdir(parents=True)
    with pytest.raises(UserError, match="presets has: tiny"):
        read_toml(presets / "tinny" / "grpo.toml")


def test_to_toml_round_trips():
    config = Config(
        name="a",
        note='quote " backslash \\ newline \n tab \t return \r bell \x07 delete \x7f 中文 \u2028',
        sizes=(),
        init_from=Path("a b/c"),
        optim=OptimConfig(lr=1e-7, clip=math.inf, warmup_steps=3, weight_decay=1e22),
    )
    table = to_dict(config)
    assert tomllib.loads(to_toml(table)) == table
    assert parse(Config, flags(table), "toy") == config
    nested = {"x": 1, "a": {"y": [True, "s"], "b": {"z": 0.5}, "c": {}}}
    assert tomllib.loads(to_toml(nested)) == nested


def test_to_dict_leaves_out_none_and_paths_become_text():
    table = to_dict(Config())
    assert "note" not in table and table["init_from"] == "pretrain" and table["optim"]["lr"] == 1e-3
