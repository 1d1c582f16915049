"""Whether a program is a table of the cases that its question shows, rather than a solution.

A table holds the inputs of the shown tests and beside each its output: as a dictionary, a chain of `if`,
lists of both, or text that is evaluated. So the constants of a program are read in order, containers opened,
text parsed where it is Python, sums of constants computed; a case is tabulated where all constants of its
input are followed, or preceded, by those of its output.
"""

import ast
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.BitXor: operator.xor,
}
SHARE = 2 / 3
"""Of the shown cases, for a program to count as a table; each published solution of MBPP holds fewer."""
OF_CONSTANTS = 1 / 2
"""Share of the program's constants that these must be: a dictionary of all months is a solution."""

Leaves = list[Any]


def tabulated(code: str, tests: Sequence[str]) -> bool:
    """Whether `code` holds two or more of the cases in `tests` (`assert f(1) == 3`), and little else."""
    try:
        cases = [case for test in tests for case in _cases(test)]
        tree = parsed(code)
        if len(cases) < 2 or tree is None:
            return False
        streams = [list(_leaves(tree, text)) for text in (False, True)]
    except RecursionError:
        return False
    columns = [[leaf for case in cases for leaf in case[side]] for side in (0, 1)]
    most = max(2, SHARE * len(cases))
    ways = [(columns, 2.0), ([a + b for a, b in cases], most), ([b + a for a, b in cases], most)]
    for stream in streams:
        for parts, enough in ways:
            held, size = _held(stream, parts)
            if held >= enough and size >= OF_CONSTANTS * len(stream):
                return True
    return False


def parsed(text: str) -> ast.Module | None:
    """The tree of a text, `None` where it is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\w" in a docstring
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _cases(test: str) -> Iterator[tuple[Leaves, Leaves]]:
    """Inputs and outputs of the comparisons of a call with constants in a test."""
    for node in ast.walk(parsed(test) or ast.Module([], [])):
        match node:
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                sides = (left, right)
            case ast.Call(args=[left, right, *_]) if "close" in ast.unparse(node.func):
                sides = (left, right)
            case _:
                continue
        for side, answer in (sides, sides[::-1]):
            calls = [inner for inner in ast.walk(side) if isinstance(inner, ast.Call)]
            innermost = [call for call in calls if not any(isinstance(arg, ast.Call) for arg in call.args)]
            given = [leaf for call in innermost[:1] for arg in call.args for leaf in _leaves(arg, False)]
            if given and (leaves := list(_leaves(answer, False))):
                yield given, leaves


def _leaves(node: ast.AST, text: bool) -> Iterator[Any]:
    """The constants below a node in order; with `text`, those in text that is Python instead of the text."""
    if (value := _constant(node)) is not None:
        inner = parsed(value[0]) if text and isinstance(value[0], str) and len(value[0]) > 1 else None
        yield from (list(_leaves(inner, False)) if inner else []) or value
        return
    pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
    for child in [part for pair in pairs for part in pair if part] or ast.iter_child_nodes(node):
        yield from _leaves(child, text)


def _constant(node: ast.AST) -> list[Any] | None:
    """The value of a constant expression, in a list; a bool is no number."""
    match node:
        case ast.Constant(value=bool() | None as value):
            return [str(value)]
        case ast.Constant(value=value):
            return [value]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inside = _constant(operand)
            return [-inside[0]] if inside and _number(inside[0]) else None
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _constant(left), _constant(right)
            of_text = a and b and isinstance(op, ast.Add) and type(a[0]) is type(b[0]) is str
            if a and b and (of_text or _number(a[0], b[0])):
                with suppress(ArithmeticError, TypeError):
                    return [_OPERATORS[type(op)](a[0], b[0])]
    return None


def _number(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and abs(value) < 1 << 64 for value in values)


def _held(stream: Leaves, parts: list[Leaves]) -> tuple[int, int]:
    """How many of `parts` are in the stream, each in constants of its own, and how many constants that is."""
    rest, held, size = list(stream), 0, 0
    for part in sorted(parts, key=len, reverse=True):
        n = len(part)
        starts = (i for i in range(len(rest) - n + 1) if rest[i] == part[0] and rest[i : i + n] == part)
        if (at := next(starts, -1)) >= 0:
            held, size = held + 1, size + n
            rest[at : at + n] = [None]
    return held, size
