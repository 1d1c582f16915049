"""Configs: what wins, what is refused and how it says so, and that a resolved config reads back."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tomli_w

from pipeline.__main__ import main
from pipeline.arguments import fields_of, load, parse, read_toml
from pipeline.errors import UserError
from pipeline.settings.common import OptimSettings, StageSettings, to_dict
from pipeline.table import COMMANDS, STAGES, Stage
from rollout.ranges import Range, ranges


@dataclass(frozen=True, kw_only=True)
class Toy(StageSettings):
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
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-3))
    """Optimizer."""

    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """A table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be at least 2.")


STAGE = Stage("toy", Toy, "toy_stage", "a toy")


def resolve(tmp_path, toml, *overrides):
    file = tmp_path / "toy.toml"
    file.write_text(toml, encoding="utf-8")
    return load(STAGE, file, list(overrides))


def refused(tmp_path, toml, *overrides):
    """The error's text, which must be one line."""
    with pytest.raises(UserError) as error:
        resolve(tmp_path, toml, *overrides)
    text = str(error.value)
    assert "\n" not in text and not set("│╭╰─") & set(text), text
    return text


def test_defaults_then_file_then_flags(tmp_path):
    assert resolve(tmp_path, "") == Toy()
    toml = 'group_size = 8\nkind = "code"\nmtp = false\nsizes = [3]\n[optim]\nlr = 0.5\nbeta1 = 0.8\n'
    got = resolve(tmp_path, toml, "--group-size", "4", "--optim.lr=0.25", "--resume")
    want = Toy(
        group_size=4, kind="code", mtp=False, sizes=(3,), resume=True, optim=OptimSettings(lr=0.25, beta1=0.8)
    )
    assert got == want
    assert resolve(tmp_path, toml, "--mtp", "--group_size", "5", "--group-size", "6").group_size == 6
    assert resolve(tmp_path, toml, "--mtp").mtp is True


def test_an_empty_group_changes_nothing(tmp_path):
    assert resolve(tmp_path, "[optim]\n") == Toy()


def test_a_nested_default_of_the_stage_survives_an_override_beside_it(tmp_path):
    got = resolve(tmp_path, "", "--optim.beta1", "0.5")
    assert got.optim == OptimSettings(lr=1e-3, beta1=0.5)  # not OptimSettings's own lr


@pytest.mark.parametrize(
    ("toml", "overrides", "says"),
    [
        ("group_sise = 8", [], ["--group-sise", "did you mean --group-size?", "toy.toml"]),
        ("[optim]\nlearning_rate = 1.0", [], ["--optim.learning-rate", "--optim."]),
        ("[optm]\nlr = 1.0", [], ["--optm.lr", "did you mean --optim.lr?"]),
        ("overlap = true", [], ["unknown setting --overlap; it is now --staleness (updates)", "toy.toml"]),
        ("", ["--tis-cap", "2"], ["unknown setting --tis-cap; it is now --correction.high"]),
        ("", ["--no-overlap"], ["unknown setting --no-overlap; it is now --staleness 0"]),
        ("[optm]", [], ["--optm", "did you mean --optim.", "toy.toml"]),
        ("optim = 3", [], ["unknown setting --optim;", "toy.toml"]),
        ("[seed]\nx = 1", [], ["--seed", "{'x': 1}"]),
        ("", ["--no-mtp=1"], ["unknown setting --no-mtp"]),
        ("", ["--weights.format"], ["--weights.format needs a value"]),
        ("weights = 3", ["--weights.format", "1", "--weights", "2"], ["--weights", "'2'"]),
        ("", ["--sede", "1"], ["--sede", "did you mean --seed?", "python -m pipeline toy"]),
        ("", ["--zzzzzz=1"], ["--zzzzzz", "--help"]),
        ('group_size = "many"', [], ["--group-size", "'many'", "integer"]),
        ("group_size = 1.5", [], ["--group-size", "1.5", "integer"]),
        ("", ["--optim.lr", "fast"], ["--optim.lr", "'fast'", "number"]),
        ("", ["--kind", "cod"], ["--kind", "'cod'", "did you mean code?"]),
        ("", ["--group-size"], ["--group-size", "needs a value"]),
        ("", ["--mtp", "yes"], ["yes"]),
        ("", ["stray"], ["stray"]),
        ("group_size = true", [], ["--group-size", "True", "no switch", "toy.toml"]),
        ("mtp = 1", [], ["--mtp", "true or false"]),
        ("sizes = [true]", [], ["--sizes", "no switch"]),
        ("[weights]\naccuracy = true", [], ["--weights", "no switch"]),
        ("[optim]\nlr = true", [], ["--optim.lr", "no switch"]),
        ("group_size = 1", [], ["group_size=1 must be at least 2."]),
        ("", ["--optim.lr", "-1"], ["optim.lr=-1.0 must be at least 0."]),
        ("", ["--optim.min-lr-ratio", "2"], ["optim.min_lr_ratio=2.0 must be in [0, 1]."]),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(tmp_path, toml, overrides, says):
    text = refused(tmp_path, toml, *overrides)
    assert all(part in text for part in says), text
    assert "Error parsing" not in text


def test_a_required_setting_that_is_missing():
    @dataclass(frozen=True, kw_only=True)
    class Bare(StageSettings):
        model: Path

    with pytest.raises(UserError, match="--model missing"):
        parse(Bare, [], "toy")
    assert parse(Bare, ["a"], "toy", positional=True).model == Path("a")
    with pytest.raises(UserError, match="unexpected argument 'b'"):
        parse(Bare, ["a", "b"], "toy", positional=True)


def test_a_table_in_a_file_replaces_the_default_and_flags_add_to_it(tmp_path):
    toml = '[weights]\naccuracy = 2.0\n"my_rewards:brevity" = 0.5\n'
    assert resolve(tmp_path, toml).weights == {"accuracy": 2.0, "my_rewards:brevity": 0.5}
    flags = ["--weights.format", "3", "--weights.my_rewards:a.b-c=-1e-1"]
    assert resolve(tmp_path, "", *flags).weights == {
        "accuracy": 1.0, "format": 3.0, "my_rewards:a.b-c": -0.1
    }  # fmt: skip
    assert resolve(tmp_path, toml, *flags).weights["format"] == 3.0
    assert "--weights.accuracy" in refused(tmp_path, "", "--weights.accuracy", "much")


def test_none_can_be_written(tmp_path):
    assert resolve(tmp_path, 'note = "x"', "--note", "none").note is None
    assert resolve(tmp_path, "", "--sizes").sizes == ()


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


def test_config_toml_reads_back(tmp_path):
    config = Toy(
        name="a",
        note='quote " backslash \\ newline \n tab \t return \r bell \x07 delete \x7f 中文 \u2028',
        sizes=(),
        init_from=Path("a b/c"),
        optim=OptimSettings(lr=1e-7, warmup_steps=3, weight_decay=1e22),
        weights={"my_rewards:brevity": 0.5},
    )
    text = tomli_w.dumps(to_dict(config))
    assert tomllib.loads(text) == to_dict(config)
    assert resolve(tmp_path, text) == config


def test_to_dict_leaves_out_none_and_paths_become_text():
    table = to_dict(Toy())
    assert "note" not in table and table["init_from"] == "pretrain" and table["optim"]["lr"] == 1e-3


# ---- ranges


def test_a_range_knows_its_ends():
    assert Range(1).holds(1) and not Range(1).holds(0) and str(Range(1)) == "at least 1"
    half = Range(0, 1, open_low=True)
    assert half.holds(1) and not half.holds(0) and str(half) == "in (0, 1]"
    assert not Range(0, 1, open_high=True).holds(1) and str(Range(0, open_low=True)) == "above 0"
    assert not any(Range().holds(x) for x in (math.nan, math.inf, -math.inf))


def numeric(settings, prefix=""):
    """Every number of a settings class: dotted name, the class that has it, its name there."""
    hints = typing.get_type_hints(settings)
    for name, hint in hints.items():
        kinds = {hint, *typing.get_args(hint)}
        if dataclasses.is_dataclass(hint):
            yield from numeric(hint, f"{prefix}{name}.")
        elif kinds & {int, float} and typing.get_origin(hint) not in (tuple, dict):
            yield prefix + name, settings, name


ENTRIES = [*STAGES, *COMMANDS]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_number_has_a_range_and_is_refused_outside_it(entry, tmp_path, monkeypatch, capsys):
    """In one line with exit code 2, and before anything is opened: no run directory appears."""
    monkeypatch.chdir(tmp_path)
    Path("stage.toml").write_text("")
    needed = {"model": "m", "benchmark": "b", "out": "o", "prompts": "p", "source": "s", "stages": "r1"}
    needed |= {"first": "a", "second": "b", "folder": "f", "path": "r"}
    required = [
        part
        for field in dataclasses.fields(entry.settings)
        if field.default is field.default_factory is dataclasses.MISSING
        for part in (f"--{field.name}", needed[field.name])
    ]
    start = [entry.name, *(["--config", "stage.toml"] if entry in STAGES else required)]
    if entry.name in ("sft", "sft2"):
        start += ["--curated", "1"]
    for dotted, owner, name in numeric(entry.settings):
        allowed = ranges(owner).get(name)
        assert allowed, f"{entry.name}: --{dotted} has no range"
        whole = typing.get_type_hints(owner)[name] in (int, int | None)
        outside = [allowed.low if allowed.open_low else allowed.low - 1]
        outside += [] if whole else [math.nan, math.inf, -math.inf]
        if allowed.high < math.inf:
            outside.append(allowed.high if allowed.open_high else allowed.high + 1)
        for value in (int(v) if whole else v for v in outside):
            flag = "--" + dotted.replace("_", "-")
            assert main([*start, f"{flag}={value}"]) == 2, f"{flag}={value}"
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{name}=" in said and "must be" in said, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stage.toml"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("grpo --temperature 0", "temperature=0.0 must be above 0"),
        ("grpo --template r2", "did you mean r1?"),
        ("eval --template bxoed", "did you mean boxed?"),
        ("grpo --overlong-buffer 97", "must be at most max_tokens=96"),
        ("grpo --minibatches 3", "the nearest that does is 2"),
        ("grpo --minibatches 4 --staleness 6", "take a multiple, such as 8"),
        ("zero --staleness 1 --rollout.vllm.sleep on", "vllm.sleep=on has no effect with staleness=1"),
        ("zero --staleness 1 --inject fp8", "inject='fp8' needs staleness=0"),
        ("sft", "nothing to train on"),
        ("distill --optim.precision fp8", "unknown setting --optim.precision"),
        ("distill --optim.recompute", "unknown setting --optim.recompute"),
    ],
)
def test_what_ranges_cannot_say(line, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("stage.toml").write_text("")
    stage, *rest = line.split()
    assert main([stage, "--config", "stage.toml", *rest]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said


def test_every_setting_is_listed_once():
    for entry in ENTRIES:
        names = [name for name, _ in fields_of(entry.settings)]
        assert len(names) == len(set(names))
