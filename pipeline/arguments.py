"""From TOML file and command line to settings: defaults, then the file, then flags; later values win.

pydantic validates the settings' dataclasses and reports errors as data; tyro renders `--help`. Neither merges
a file with flags nor names the nearest right key: that is here.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import tyro

from pipeline.errors import UserError
from pipeline.table import Stage

HELP = ("--help", "-h")


def fields_of(settings: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, type); those of a nested group as `optim.lr`."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def known_flags(settings: type) -> Iterator[str]:
    """Every flag that a settings class takes; of a table, such as `rewards`, those of its default."""
    for name, hint in fields_of(settings):
        flag = "--" + name.replace("_", "-")
        if typing.get_origin(hint) is dict:
            default = next(f.default_factory for f in dataclasses.fields(settings) if f.name == name)
            assert default is not dataclasses.MISSING
            yield from (f"{flag}.{key}" for key in default())
        else:
            yield flag
            if hint is bool:
                yield negation(flag)


def negation(flag: str) -> str:
    """The flag that switches another off: `--no-mtp`, `--optim.no-recompute`."""
    group, dot, name = flag[2:].rpartition(".")
    return f"--{group}{dot}no-{name}"


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """`; did you mean NAME?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def read_flags(settings: type, args: list[str], where: str, positional: bool = False) -> dict[str, Any]:
    """The command line as a nested table, values as text.

    Args:
        positional: settings without a default may stand before the flags, in order.

    Raises:
        UserError: a flag that `settings` does not have, or one without its value.
    """
    types = dict(fields_of(settings))
    table: dict[str, Any] = {}
    if positional:
        required = (f.name for f in dataclasses.fields(settings) if _required(f))
        first = list(itertools.takewhile(lambda arg: not arg.startswith("--"), args))
        args = args[len(first) :]
        for name, value in zip(required, first, strict=False):
            table[name] = value
        if stray := first[len(table) :]:
            raise UserError(f"{where}: unexpected argument {stray[0]!r}")
    while args:
        arg, *args = args
        if not arg.startswith("--"):
            raise UserError(f"{where}: unexpected argument {arg!r}")
        flag, equals, value = arg.partition("=")
        name = flag[2:].replace("-", "_")
        outer, dot, last = name.rpartition(".")
        negated = outer + dot + last.removeprefix("no_")
        group, _, key = flag[2:].partition(".")
        if typing.get_origin(types.get(group.replace("-", "_"))) is dict and key:
            name, hint = f"{group.replace('-', '_')}\0{key}", float
        elif name not in types and types.get(negated) is bool and not equals:
            _put(table, negated, False)
            continue
        elif name in types:
            hint = types[name]
        else:
            hint_text = nearest(flag.replace("_", "-"), [*known_flags(settings), *HELP])
            raise UserError(f"{where}: unknown setting {flag}{hint_text} (--help lists them all)")
        if hint is bool and not equals:
            _put(table, name, True)
            continue
        values = list(itertools.takewhile(lambda arg: not arg.startswith("--"), args))
        if typing.get_origin(hint) is tuple:
            _put(table, name, [value] if equals else values)
            args = args[0 if equals else len(values) :]
        elif equals or values:
            chosen = value if equals else values[0]
            _put(table, name, None if chosen in ("none", "None") and _optional(hint) else chosen)
            args = args[0 if equals else 1 :]
        else:
            raise UserError(f"{where}: {flag} needs a value (--help lists every setting)")
    return table


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    """Set `a.b.c`, or `a\\0key with . in it`, in nested tables."""
    *groups, last = name.split("\0") if "\0" in name else name.split(".")
    for group in groups:
        table = table.setdefault(group, {})
    table[last] = value


def defaults(settings: Any) -> dict[str, Any]:
    """The defaults of a settings class (or the values of an instance) by name, groups as tables."""
    table = {}
    for field in dataclasses.fields(settings):
        if not isinstance(settings, type):
            value = getattr(settings, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            value = field.default
        else:
            continue
        table[field.name] = defaults(value) if dataclasses.is_dataclass(value) else value
    return table


def merge(
    base: dict[str, Any], over: Mapping[str, Any], known: Mapping[str, Any], where: str, add: bool = False
) -> None:
    """Put the values of `over` into `base`, group by group.

    Args:
        known: every setting's type by dotted name.
        add: entries of a table, such as `rewards`, are added to those there; else the table is replaced.

    Raises:
        UserError: a key that is no setting, with the nearest one that is.
    """

    def walk(base: dict[str, Any], over: Mapping[str, Any], prefix: str) -> None:
        for key, value in over.items():
            name = prefix + key.replace("-", "_")
            last = name.rpartition(".")[2]
            if name in known:
                both = add and isinstance(base.get(last), dict)
                base[last] = {**base[last], **value} if both else value
            elif isinstance(value, Mapping) and any(leaf.startswith(f"{name}.") for leaf in known):
                walk(base.setdefault(last, {}), value, f"{name}.")
            else:
                while isinstance(value, Mapping) and value:  # an unknown group: name its first setting
                    inner, value = next(iter(value.items()))
                    name += f".{inner}"
                flag = "--" + name.replace("_", "-")
                hint = nearest(flag, ["--" + leaf.replace("_", "-") for leaf in known])
                raise UserError(f"{where}: unknown setting {flag}{hint} (--help lists them all)")

    walk(base, over, "")


def build(settings: type, flags: Mapping[str, Any], prog: str, table: Mapping[str, Any], file: str) -> Any:
    """Settings from the defaults, then a file's table, then the flags.

    Raises:
        UserError: in one line, an unknown setting, a wrong type, a value out of its range, or a missing one.
    """
    values, known = defaults(settings), dict(fields_of(settings))
    merge(values, table, known, file)
    merge(values, flags, known, prog, add=True)
    try:
        return pydantic.TypeAdapter(settings).validate_python(values)
    except pydantic.ValidationError as errors:
        found = errors.errors()
        missing = ", ".join(f"--{e['loc'][-1]}" for e in found if e["type"] == "missing")
        wrong = f"{missing} missing (--help lists every setting)" if missing else one_line(found[0])
        raise UserError(f"{prog}: {wrong}") from errors


def one_line(error: Any) -> str:
    """What pydantic found, with the setting's name, the value, and the nearest right one."""
    names = [str(part) for part in error["loc"] if not str(part).isdigit()]
    name = ".".join(names)
    if error["type"] == "value_error":
        return f"{name}.{error['ctx']['error']}" if name else str(error["ctx"]["error"])
    flag = "--" + name.replace("_", "-")
    said = error["msg"][0].lower() + error["msg"][1:]
    line = f"{flag} cannot be {error['input']!r}: {said}"
    if error["type"] == "literal_error":
        choices = [part.strip("'") for part in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return line + nearest(str(error["input"]), choices)
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
    """The stage's settings: defaults, then `file`, then `overrides`."""
    prog = f"python -m pipeline {stage.name}"
    show_help(stage.settings, overrides, prog)
    table = read_toml(file) if file else {}
    return build(stage.settings, read_flags(stage.settings, overrides, prog), prog, table, str(file))


def parse(settings: type, args: list[str], prog: str, positional: bool = False) -> Any:
    """A command's settings from its command line. `--help` prints and exits with 0."""
    show_help(settings, args, prog, positional)
    return build(settings, read_flags(settings, args, prog, positional), prog, {}, "")


def show_help(settings: type, args: list[str], prog: str, positional: bool = False) -> None:
    """Print every setting and exit with 0 where `args` ask for it."""
    if set(HELP) & set(args):
        config = (tyro.conf.PositionalRequiredArgs,) if positional else ()
        tyro.cli(settings, args=["--help"], prog=prog, config=config)
