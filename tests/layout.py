"""The rules of the layout (tests/test_layout.py): imports, sizes, names.

A rule is a function from source text by path to what breaks it, so that a test can plant a violation.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "rollout", "rewards", "pipeline", "distill")
MOST_LINES = 27_500
"""Of the product."""
MOST_IN_A_FILE = 400
MOST_IN_A_FOLDER = 12
"""Files, `__init__.py` not counted."""

MAY_SEE = {
    "model": {"model"},
    "rewards": {"rewards", "rollout"},
    "rollout": {"rollout", "model"},
    "pipeline": {"pipeline", "rewards", "rollout", "model"},
    "distill": set(PACKAGES),
}
SETTINGS_SEE = {"rollout.ranges", "rollout.settings", "rollout.types", "rollout.text.templates"}
"""Of the other packages; `rewards` beside them."""
MAY_BE_LATE = {
    ("pipeline/__main__.py", "*"),  # after --help: what a stage needs takes seconds to import
    ("model/kernels/fp8/gemm.py", "model.kernels.fp8.cuda"),  # imports Triton, which a CPU does not have
    ("pipeline/train/logprobs.py", "model.kernels.fused"),
}

Sources = dict[str, str]
"""Text of Python files by path, relative to the checkout."""


def read(*tops: str) -> Sources:
    """Every Python file below these folders."""
    files = sorted(file for top in tops for file in (ROOT / top).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


PRODUCT, TESTS = read(*PACKAGES), read("tests")


@dataclass(frozen=True)
class Import:
    """One imported module; of `from a import b` that is `a.b` where it is a file of ours, else `a`."""

    name: str
    late: bool
    """Inside a function."""
    for_types: bool
    """Under `if TYPE_CHECKING`: it never runs."""

    @property
    def top(self) -> str:
        """First part of the dotted name."""
        return self.name.partition(".")[0]


def modules(sources: Sources) -> dict[str, str]:
    """Path by dotted name."""
    return {path[:-3].replace("/", ".").removesuffix(".__init__"): path for path in sources}


@functools.cache
def tree(text: str) -> ast.Module:
    """The file, parsed once."""
    return ast.parse(text)


@functools.cache
def written(path: str, text: str) -> list[tuple[str, list[str], bool, bool]]:
    """Each import of a file: module, names taken from it, in a function, for types.

    `import_module("a.b")` with a literal name is one.
    """
    late, for_types = set[int](), set[int]()
    for node in ast.walk(tree(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for_types |= {id(inner) for part in node.body for inner in ast.walk(part)}
    out = []
    for node in ast.walk(tree(text)):
        found: list[tuple[str, list[str]]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = path[:-3].split("/")[: -node.level] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found = [(base, [alias.name for alias in node.names])]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found = [(arg.value, []) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        out += [(base, names, id(node) in late, id(node) in for_types) for base, names in found]
    return out


def imports(path: str, sources: Sources) -> Iterator[Import]:
    """All imports of a file."""
    known = modules(sources)
    for base, names, late, for_types in written(path, sources[path]):
        for name in names or [""]:
            yield Import(full if (full := f"{base}.{name}") in known else base, late, for_types)


def outside(found: Iterable[Import]) -> set[str]:
    """Packages that are neither ours nor the standard library."""
    return {i.top for i in found} - set(sys.stdlib_module_names) - set(PACKAGES)


# ---- rules


def imports_point_one_way(sources: Sources) -> Iterator[str]:
    """Types <- model, rewards <- rollout <- pipeline <- distill; vLLM, tyro and engines in one place each."""
    for path in sources:
        package, found = path.partition("/")[0], list(imports(path, sources))
        others = outside(found)
        wrong = {i.name for i in found if i.top in PACKAGES and i.top not in MAY_SEE[package]}
        if package == "rewards":
            wrong |= {i.name for i in found if i.top == "rollout"} - {"rollout.types"}
        if package == "model":
            allowed = {"torch", "safetensors", "numpy"}
            allowed |= {"transformers"} if path == "model/dense.py" else set()
            allowed |= {"triton", "deep_gemm"} if path.startswith("model/kernels/") else set()
            wrong |= others - allowed
        if package == "rollout":
            wrong |= {i.name for i in found} & {"rollout.open"}
        if path == "rollout/types.py":
            wrong |= {i.name for i in found if i.top in PACKAGES} | others
        if not path.startswith("rollout/vllm/"):
            wrong |= others & {"vllm"}
        if path != "pipeline/arguments.py":
            wrong |= others & {"tyro"}
        yield from (f"{path} imports {name}" for name in sorted(wrong))


def settings_are_light(sources: Sources) -> Iterator[str]:
    """Settings see few modules of ours, and importing them imports nothing but the standard library."""
    known = modules(sources)
    todo = [path for path in sources if path.startswith("pipeline/settings/")]
    for path in todo:
        for i in imports(path, sources):
            allowed = i.name in SETTINGS_SEE or i.name.startswith("pipeline.settings") or i.top == "rewards"
            if i.top in PACKAGES and not allowed:
                yield f"{path} imports {i.name}"
    seen = set(todo)
    while todo:
        path = todo.pop()
        now = [i for i in imports(path, sources) if not i.late and not i.for_types]
        yield from (f"{path}, which settings import, imports {name}" for name in sorted(outside(now)))
        parts = [name.split(".") for name in {i.name for i in now}]
        names = {".".join(of[:end]) for of in parts for end in range(1, len(of) + 1)}  # packages run first
        new = {known[name] for name in names & known.keys()} - seen
        seen |= new
        todo += new


def imports_form_no_circle(sources: Sources) -> Iterator[str]:
    """Over files; imports inside functions count, those for type checkers do not."""
    known = modules(sources)
    graph = {
        path: {known[i.name] for i in imports(path, sources) if i.name in known and not i.for_types} - {path}
        for path in sources
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield " <- ".join(error.args[1])


def own_imports_stand_at_the_top(sources: Sources) -> Iterator[str]:
    """None of ours inside a function but for `MAY_BE_LATE`."""
    for path in sources:
        for i in imports(path, sources):
            if i.late and i.top in PACKAGES and not {(path, "*"), (path, i.name)} & MAY_BE_LATE:
                yield f"{path} imports {i.name} inside a function"


def folders_are_small(sources: Sources) -> Iterator[str]:
    """A reader finds the file by its folder."""
    files = (PurePosixPath(path) for path in sources if not path.endswith("__init__.py"))
    for folder, number in Counter(file.parent for file in files).items():
        if number > MOST_IN_A_FOLDER:
            yield f"{folder}/ has {number} files, at most {MOST_IN_A_FOLDER}"


def files_are_small(sources: Sources) -> Iterator[str]:
    """One idea a file."""
    for path, text in sources.items():
        if (lines := len(text.splitlines())) > MOST_IN_A_FILE:
            yield f"{path} has {lines} lines, at most {MOST_IN_A_FILE}"


def names_are_unique(sources: Sources) -> Iterator[str]:
    """Public functions and classes at the top of a file, within a package; `run` and `main` aside."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, text in sources.items():
        for node in tree(text).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[path.partition("/")[0], node.name].append(path)
    for (_, name), paths in found.items():
        if len(set(paths)) > 1 and not name.startswith("_") and name not in ("run", "main"):
            yield f"{name} is defined in {' and '.join(paths)}"


def product_is_small(sources: Sources) -> Iterator[str]:
    """Lines of all files together."""
    if (lines := sum(len(text.splitlines()) for text in sources.values())) > MOST_LINES:
        yield f"{lines} lines, at most {MOST_LINES}"


RULES = (
    imports_point_one_way,
    settings_are_light,
    imports_form_no_circle,
    own_imports_stand_at_the_top,
    folders_are_small,
    files_are_small,
    names_are_unique,
    product_is_small,
)
