"""What the code of a prompt defines beside the function asked for: the tests' own, not the program's.

HumanEval/32 gives `poly` in the prompt and its tests call it. A program that redefines it would decide what
the tests compute, and the function asked for alone would fail without it.
"""

import ast
import re
import textwrap

from rewards.programs.tables import parsed

_FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def preamble(prompt: str, entry_point: str) -> str:
    """What a prompt's code defines beside the entry point: imports, functions, classes, constants, as source.

    Definitions that the prompt leaves to be written (an empty body) are left out. "" where there is none, or
    where neither the prompt nor a code fence in it is Python.

    Args:
        entry_point: Name of the function or class asked for; of `Solution().f` both names count.
    """
    asked = set(re.findall(r"\w+", entry_point))
    for text in (prompt, *_FENCE.findall(prompt)):
        tree = parsed(textwrap.dedent(text))
        if tree and (kept := [node for node in tree.body if _given(node, asked)]):
            return "\n".join(map(ast.unparse, kept))
    return ""


def _given(node: ast.stmt, asked: set[str]) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign(targets=targets):
            return asked.isdisjoint(name.id for name in targets if isinstance(name, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            return name not in asked
        case ast.ClassDef():
            return node.name not in asked and all(
                _given(inner, asked)
                for inner in node.body
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef))
            )
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return node.name not in asked and not all(map(_empty, node.body))
    return False


def _empty(node: ast.stmt) -> bool:
    """A docstring, `...`, `pass` or `raise NotImplementedError`."""
    return isinstance(node, ast.Pass | ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
