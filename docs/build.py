"""Write docs/api/*.md and docs/settings.md from the docstrings: `python -m docs.build`, at the root.

The API pages are read from the source; the settings page also imports the settings, for their defaults.
"""

import ast
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from pipeline.table import COMMANDS, STAGES, Command, Stage
from rollout.ranges import ranges

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "rollout", "rewards", "pipeline", "distill")
MADE = "<!-- Made from docstrings by `python -m docs.build`: edit those. -->"
SETTINGS = """# Settings

Every setting of every stage and command; the presets in `configs/` change some defaults. `--optim.clip 0` on
the command line is `clip = 0` under `[optim]` in a TOML file; flags win over the file. A switch is `--resume`
or `--no-resume`, a list is `--problems A B`, an entry of a table is `--rewards.format 0.2`. `grade` takes its
required settings without their flags too, in order.
"""
GENERATED = [*(f"docs/api/{package}.md" for package in PACKAGES), "docs/settings.md"]
WORDS = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}


def escape(text: str) -> str:
    """Markdown that shows `text` as it is, in one line; code spans stay."""
    parts = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    parts[::2] = [re.sub(r"[*<|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def markdown(doc: str) -> str:
    """A docstring as Markdown: `Args:` and the like as lists, equations and aligned columns as code."""
    out = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        title, _, rest = block.partition("\n")
        if title in ("Args:", "Returns:", "Yields:", "Raises:"):
            entries = [escape(entry) for entry in re.split(r"\n(?!\s)", dedent(rest))]
            out.append("\n".join([title, "", *(re.sub(r"^(\w+): ", r"- `\1`: ", e) for e in entries)]))
        elif re.search(r"^\s|\S {2,}\S", block, re.MULTILINE):
            out.append(f"```text\n{dedent(block)}\n```")
        else:
            out.append(escape(block))
    return "\n\n".join(out) + "\n\n"


def public(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """What a module or class defines in public, with its docstring; an assignment's stands under it."""
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
                yield node, ast.get_docstring(node) or ""
        elif isinstance(node, ast.AnnAssign | ast.Assign) and not ast.unparse(node).startswith("_"):
            under = after.value if isinstance(after, ast.Expr) else None
            yield node, str(under.value) if isinstance(under, ast.Constant) else ""


def members(body: list[ast.stmt], lines: list[str], inner: bool = False) -> Iterator[str]:
    """Assignments as a list; functions and classes with their signatures, under headings at the top level."""
    for node, doc in public(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            above = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
            signature = dedent("\n".join(lines[node.lineno - 1 : max(node.body[0].lineno - 1, node.lineno)]))
            code = "\n".join([*above, re.sub(r":( \.\.\.)?(\s*#.*)?$", "", signature)])
            yield ("\n" if inner else f"\n### {node.name}\n\n") + f"```python\n{code}\n```\n\n{markdown(doc)}"
            if isinstance(node, ast.ClassDef):
                yield from members(node.body, lines, inner=True)
        elif doc or (inner and isinstance(node, ast.AnnAssign)):
            yield f"- `{' '.join(ast.unparse(node).split())}`" + (f": {escape(doc)}\n" if doc else "\n")


def api(package: str) -> str:
    """The page of a package: its modules, and what is public in each."""
    out = [f"# {package}\n\n{MADE}\n"]
    for path in sorted(p.relative_to(ROOT).with_suffix("") for p in (ROOT / package).rglob("*.py")):
        source = (ROOT / path).with_suffix(".py").read_text(encoding="utf-8")
        tree, name = ast.parse(source), ".".join(path.parts).removesuffix(".__init__")
        if tree.body:
            out.append(f"\n## {name}\n\n[source](../../{path.as_posix()}.py)\n\n")
            out += [markdown(ast.get_docstring(tree) or ""), *members(tree.body, source.splitlines())]
    return re.sub(r"\n{3,}", "\n\n", "".join(out)).rstrip() + "\n"


def kind(hint: typing.Any) -> str:
    """A setting's type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(arg) for arg in args if arg is not types.NoneType)
    if origin in (tuple, dict):
        return f"list of {kind(args[0])}" if origin is tuple else f"table of {kind(args[1])}"
    return WORDS.get(hint, str(hint))


def rows(config: type, made: typing.Any = None, prefix: str = "--") -> Iterator[str]:
    """Table rows of a settings class; `made` is the group that holds the defaults, `None` at the top."""
    hints, docs, limits = typing.get_type_hints(config), dict[str, str](), ranges(config)
    for base in reversed(config.__mro__[:-1]):
        tree = ast.parse(Path(sys.modules[base.__module__].__file__ or "").read_text(encoding="utf-8"))
        body = next(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == base.__name__)
        docs |= {ast.unparse(n.target): d for n, d in public(body) if d and isinstance(n, ast.AnnAssign)}
    for field in dataclasses.fields(config):
        name, doc = prefix + field.name.replace("_", "-"), escape(docs[field.name])
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = value if made is None else getattr(made, field.name)
        if dataclasses.is_dataclass(value):
            yield f"| `{name}` | group | | {doc} |"
            yield from rows(type(value), value, f"{name}.")
            continue
        shown = f"`{json.dumps(value, default=str, ensure_ascii=False)}`"
        shown = "required" if value is dataclasses.MISSING else "none" if value is None else shown
        allowed = f" {limits[field.name]}" if field.name in limits else ""
        yield f"| `{name}` | {kind(hints[field.name])}{allowed} | {shown} | {doc} |"


def settings() -> str:
    """The page of all settings: a table for each settings class, stages that share one together."""
    users: dict[type, list[Stage | Command]] = {}
    for entry in (*STAGES, *COMMANDS):
        users.setdefault(entry.settings, []).append(entry)
    out = [SETTINGS, MADE]
    for config, entries in users.items():
        out += [f"\n## {', '.join(e.name for e in entries)}\n"]
        out += [f"- `{e.name}`: {e.summary}" for e in entries]
        out += ["", markdown(inspect.getdoc(config) or "") + "| setting | type | default | meaning |"]
        out += ["| --- | --- | --- | --- |", *rows(config)]
    return "\n".join(out) + "\n"


def pages() -> dict[str, str]:
    """Path below the root -> text, for each of `GENERATED`."""
    return dict(zip(GENERATED, [*map(api, PACKAGES), settings()], strict=True))


if __name__ == "__main__":
    (ROOT / "docs/api").mkdir(exist_ok=True)
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")
