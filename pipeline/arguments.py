"""Configs: a frozen dataclass a stage, filled from defaults, a TOML file, then flags; the last word wins.

File and flags go through one parser (tyro) and one set of errors. Nothing here imports torch, so
`--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from pipeline.errors import UserError
from pipeline.table import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """What every stage has."""

    name: str = "tiny"
    """Name of the run; everything goes to RUNS/NAME/STAGE/."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    seed: int = 0
    """Seed of every random draw; same config and seed give the same bits on a CPU."""
    resume: bool = False
    """Go on from the newest checkpoint of this run directory (or start it, when there is none)."""
    threads: int = 0
    """CPU threads for torch; 0 = one a core. Bits are reproducible for an equal number of threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule, and the arithmetic. Betas and decay: DeepSeek-V3, arXiv:2412.19437, Sec. 4.2."""

    lr: float = 3e-6
    """Peak learning rate (R1's RL: 3e-6)."""
    warmup_steps: int = 0
    """Optimizer updates over which the rate rises linearly from 0."""
    schedule: typing.Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up, down to `min_lr_ratio` at the last update."""
    min_lr_ratio: float = 0.1
    """Last rate as a share of the peak (cosine and linear)."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    weight_decay: float = 0.1
    """Decoupled decay, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    router_bias_gamma: float = 0.001
    """Step of the router's balancing bias after each update (arXiv:2412.19437, Sec. 2.1.2); 0 = frozen."""
    precision: typing.Literal["float32", "bfloat16", "fp8"] = "float32"
    """Arithmetic of forward and backward. `bfloat16` and `fp8` keep fp32 masters and leave a bf16 model;
    `fp8` has the products of linear layers and experts in blockwise FP8 too (arXiv:2412.19437, Sec. 3.3)."""
    moments: typing.Literal["float32", "bfloat16"] = "float32"
    """What AdamW's moments are stored in (arXiv:2412.19437, Sec. 3.3.3: bfloat16)."""
    recompute: bool = False
    """Activation checkpointing: layers are computed again in the backward, for memory (native model)."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} must be above 0.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio={self.min_lr_ratio} must be in [0, 1].")
        if self.moments == "bfloat16" and self.beta2 > 0.99:
            raise ValueError(
                f"optim.moments=bfloat16 cannot hold beta2={self.beta2}: rounding would keep the second "
                "moment from decaying. Set optim.beta2 to 0.99 or less, or optim.moments to float32."
            )


def flags(table: dict[str, Any], prefix: str = "--") -> list[str]:
    """A TOML table as flags, so that file and command line go through one parser and one set of errors."""
    out: list[str] = []
    for key, value in table.items():
        name = key if prefix == "--rewards." else key.replace("_", "-")
        if isinstance(value, dict):
            out += flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            out.append(f"{prefix}{name}" if value else f"{prefix}no-{name}")
        else:
            out += [prefix + name, *map(str, value if isinstance(value, list) else [value])]
    return out


def known_flags(config: type, prefix: str = "--") -> Iterator[str]:
    """Every flag that a config class takes, nested ones as `--optim.lr`."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        name, hint = field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from known_flags(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name
            if hint is bool:
                yield f"{prefix}no-{name}"


def refuse_unknown(config: type, args: list[str], where: str) -> None:
    """Raise `UserError` with the nearest right key for the first flag that `config` does not have."""
    known = [*known_flags(config), "--help", "-h"]
    for arg in args:
        key = arg.split("=", 1)[0].replace("_", "-")
        if key.startswith("--rewards.") and "--rewards" in known:
            continue
        if key.startswith("--") and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{where}: unknown setting {key}{hint} (--help lists them all)")


registry = ConstructorRegistry()


@registry.primitive_rule
def weights_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A `Mapping[str, float]` is one flag whose value is JSON."""
    if typing.get_origin(info.type) is not Mapping:
        return None
    return PrimitiveConstructorSpec(
        1, ".NAME WEIGHT", lambda args: json.loads(args[0]), lambda value: True, lambda v: [json.dumps(v)]
    )


def with_weights(config: type, args: list[str]) -> list[str]:
    """The flags `--rewards.NAME WEIGHT` as one flag, added to the config's default."""
    if "--rewards" not in known_flags(config):
        return args
    default: Any = next(f for f in dataclasses.fields(config) if f.name == "rewards").default_factory
    weights = default()
    rest, words = [], iter(args)
    for word in words:
        if not word.startswith("--rewards."):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix("--rewards.").partition("=")
        value = value if equals else next(words, "")
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(f"the weight of reward {name!r} must be a number, not {value!r}.") from None
    return [*rest, "--rewards", json.dumps(weights)]


def parse(config: type, args: list[str], prog: str) -> Any:
    """Build `config` from flags. A bad value raises `UserError`, in one line; `--help` prints and exits 0."""
    said = io.StringIO()
    if "--help" in args or "-h" in args:
        return tyro.cli(config, args=["--help"], prog=prog, registry=registry)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(config, args=with_weights(config, args), prog=prog, registry=registry)
    except ValueError as error:
        raise UserError(f"{prog}: {error}") from error
    except SystemExit as stop:
        raise UserError(f"{prog}: {one_line(said.getvalue())} (--help lists every setting)") from stop


def one_line(said: str) -> str:
    """What tyro's framed error says, without the frame: what was found, what was wanted, what is near."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯┌┐└┘├┤]", " ", said).split())
    # The parts: title, message, help of the argument, ...
    parts = [part.strip() for part in re.split(r"[-─]{5,}", text)]
    line = re.sub(r"^Error parsing [^-\s]\S*: ", "", parts[1] if len(parts) > 1 else text)
    if wrong := re.match(r"Error parsing (--\S+): .*?('.*')$", line):
        wanted = parts[2].removeprefix("Argument helptext: ") if len(parts) > 2 else wrong[1]
        return f"{wrong[1]} cannot be {wrong[2]}; wanted: {wanted}"
    if choice := re.match(r"invalid choice '(.*)' for argument .* one of \((.*)\)", line):
        near = difflib.get_close_matches(choice[1], re.findall(r"'([^']*)'", choice[2]), n=1)
        return line.rstrip(".") + (f"; did you mean {near[0]}?" if near else "")
    return line


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as a table, or a `UserError` that names the file and the line."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        folder = file.parent
        have = sorted(p.name for p in folder.glob("*.toml")) or sorted(
            p.name for p in folder.parent.glob("*/")
        )
        where = folder if folder.is_dir() else folder.parent
        raise UserError(f"no config {file}; {where} has: {', '.join(have) or 'nothing'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not a TOML file: {error}") from error


def load(stage: Stage, file: Path | None, overrides: list[str]) -> Any:
    """The stage's config: defaults, then `file`, then `overrides`."""
    config = import_module(stage.module).Config
    from_file = flags(read_toml(file)) if file else []
    refuse_unknown(config, from_file, str(file))
    refuse_unknown(config, overrides, f"python -m pipeline {stage.name}")
    return parse(config, from_file + overrides, prog=f"python -m pipeline {stage.name}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, `None` left out, for TOML and JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {
                f.name: plain(v)
                for f in dataclasses.fields(value)
                if (v := getattr(value, f.name)) is not None
            }
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {key: plain(v) for key, v in value.items()}
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def to_toml(table: dict[str, Any], prefix: str = "") -> str:
    """The TOML text of `to_dict`: scalars and lists first, then a section for each nested table."""

    def literal(value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, list):
            return "[" + ", ".join(map(literal, value)) + "]"
        if isinstance(value, str):  # JSON's escapes are TOML's, but for one character
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return repr(value)

    def name(key: str) -> str:
        return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else literal(key)

    lines = [f"{name(key)} = {literal(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", to_toml(value, f"{prefix}{key}.").rstrip()]
    return "\n".join(lines) + "\n"
