"""From TOML file and command line to settings: defaults, then the file, then flags; later values win.

pydantic validates the settings' dataclasses and reports errors as data; tyro renders `--help`. Neither merges
a file with flags nor names the nearest right key: that is here.
"""

import dataclasses
import difflib
import functools
import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import tyro

from pipeline.errors import UserError
from pipeline.run.files import read_toml
from pipeline.table import Stage
from rollout.ranges import Settings

HELP = ("--help", "-h")
RENAMED = {"overlap": "staleness (updates)", "no_overlap": "staleness 0", "tis_cap": "correction.high"}
"""Settings of earlier versions, and what they are now."""


def fields_of(settings: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, type); those of a nested group as `optim.lr`."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(typing.cast(type, hint), f"{name}.")
        else:
            yield name, hint


def known_flags(settings: type) -> Iterator[str]:
    """Every flag that a settings class takes; of a table, such as `rewards`, those of its default."""
    for name, hint in fields_of(settings):
        if typing.get_origin(hint) is dict:
            yield from (f"{flag_of(name)}.{key}" for key in defaults(settings)[name])
        else:
            yield flag_of(name)
            if hint is bool:
                yield flag_of(negation(name))


def flag_of(name: str) -> str:
    """`optim.min_lr_ratio` -> `--optim.min-lr-ratio`."""
    return "--" + name.replace("_", "-")


def negation(name: str) -> str:
    """What switches a setting off: `no_mtp`, `optim.no_recompute`."""
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}no_{last}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def unknown(where: str, flag: str, known: Iterable[str]) -> UserError:
    """The error of a setting that does not exist, with the nearest one that does."""
    now = RENAMED.get(flag.removeprefix("--").replace("-", "_"))
    hint = f"; it is now --{now}" if now else nearest(flag.replace("_", "-"), known)
    return UserError(f"{where}: unknown setting {flag}{hint} (--help lists them all)")


def read_flags(
    settings: type, args: list[str], where: str, positional: bool = False
) -> Iterator[tuple[str, Any]]:
    """Dotted name and value, as text, of each setting on the command line.

    Args:
        positional: settings without a default may stand before the flags, in order.

    Raises:
        UserError: a flag that `settings` does not have, or one without its value.
    """
    types = dict(fields_of(settings))
    negated = {negation(name): name for name, hint in types.items() if hint is bool}
    if positional:
        required = (f.name for f in dataclasses.fields(settings) if f.name not in defaults(settings))
        first = [f"--{name}={value}" for value, name in zip(values_before_flag(args), required, strict=False)]
        args = first + args[len(first) :]
    while args:
        arg, *args = args
        flag, equals, value = arg.partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{where}: unexpected argument {arg!r}")
        name = flag[2:].replace("-", "_")
        table, key = name.partition(".")[0], flag[2:].partition(".")[2]
        if not equals and (name in negated or types.get(name) is bool):
            yield negated.get(name, name), name not in negated
            continue
        in_table = key and typing.get_origin(types.get(table)) is dict
        if not in_table and name not in types:
            raise unknown(where, flag, [*known_flags(settings), *HELP])
        many = not in_table and typing.get_origin(types[name]) is tuple
        values = [value] if equals else values_before_flag(args)[: None if many else 1]
        args = args[0 if equals else len(values) :]
        if many:
            yield name, values
        elif not values:
            raise UserError(f"{where}: {flag} needs a value (--help lists every setting)")
        elif in_table:
            yield table, {key: values[0]}
        else:
            none = values[0] in ("none", "None") and type(None) in typing.get_args(types[name])
            yield name, None if none else values[0]


def split(settings: type, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of `settings`, those before the first flag included, and all others."""
    own, others = list[str](), list[str]()
    into, known = own, {*known_flags(settings), *HELP}
    for arg in args:
        if arg.startswith("--") or arg in HELP:
            into = own if arg.partition("=")[0] in known else others
        into.append(arg)
    return own, others


def values_before_flag(args: list[str]) -> list[str]:
    """The arguments before the first flag."""
    return list(itertools.takewhile(lambda arg: not arg.startswith("--"), args))


def defaults(settings: type) -> dict[str, Any]:
    """The defaults of a settings class by name, groups as tables."""
    values = {}
    for field in dataclasses.fields(settings):
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return {name: dataclasses.asdict(v) if isinstance(v, Settings) else v for name, v in values.items()}


def leaves(table: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of what a nested table sets; one setting that is a table stays one."""
    for key, value in table.items():
        name = prefix + key.replace("-", "_")
        group = any(leaf.startswith(f"{name}.") for leaf in known)
        if name not in known and isinstance(value, Mapping) and (value or group):
            yield from leaves(value, known, f"{name}.")
        else:
            yield name, value


def load(stage: Stage, file: Path | None, overrides: list[str]) -> Any:
    """The stage's settings: defaults, then `file`, then `overrides`."""
    return parse(stage.settings, overrides, f"python -m pipeline {stage.name}", file=file)


def parse(
    settings: type, args: list[str], prog: str, positional: bool = False, file: Path | None = None
) -> Any:
    """Settings from the defaults, then a file, then the command line; `--help` prints them and exits with 0.
    A table in the file, such as `rewards`, replaces the default; flags add to it. Raises `UserError`: in one
    line, an unknown setting, a wrong type, a value out of its range, or a missing one."""
    if set(HELP) & set(args):
        config = (tyro.conf.PositionalRequiredArgs,) if positional else ()
        tyro.cli(settings, args=["--help"], prog=prog, config=config)
    known = dict(fields_of(settings))
    values = dict(leaves(defaults(settings), known))
    for name, value in leaves(read_toml(file), known) if file else ():
        if name not in known:
            raise unknown(str(file), flag_of(name), map(flag_of, known))
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        switch = known[name] is bool
        if any(isinstance(part, bool) for part in parts) is not switch:  # to pydantic true is 1
            kind = "true or false" if switch else "no switch"
            raise UserError(f"{file}: {flag_of(name)} cannot be {value!r}: it is {kind}")
        values[name] = value
    for name, value in read_flags(settings, args, prog, positional):
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | value if both else value
    for name in (name for name, value in values.items() if "\0" in str(value)):
        raise UserError(f"{prog}: {flag_of(name)} has a null character, which no name of a file may have")
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        functools.reduce(lambda table, group: table.setdefault(group, {}), groups, nested)[last] = value
    try:
        return pydantic.TypeAdapter(settings).validate_python(nested)
    except pydantic.ValidationError as errors:
        found = errors.errors()
        missing = ", ".join(f"--{e['loc'][-1]}" for e in found if e["type"] == "missing")
        wrong = f"{missing} missing (--help lists every setting)" if missing else one_line(found[0])
        raise UserError(f"{prog}: {wrong}") from errors


def one_line(error: Any) -> str:
    """What pydantic found, with the setting's name, the value, and the nearest right one."""
    name = ".".join(str(part) for part in error["loc"] if not str(part).isdigit())
    if error["type"] == "value_error":
        return f"{name}.{error['ctx']['error']}" if name else str(error["ctx"]["error"])
    reason = error["msg"][0].lower() + error["msg"][1:]
    choices = re.findall("'(.*?)'", error["msg"]) if error["type"] == "literal_error" else []
    return f"{flag_of(name)} cannot be {error['input']!r}: {reason}{nearest(str(error['input']), choices)}"
