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

Leaves = list[Any]


def tabulated(code: str, tests: Sequence[str]) -> bool:
    """Whether `code` holds two or more of the cases in `tests` (`assert f(1) == 3`), and `SHARE` of them."""
    cases = [case for test in tests for case in _cases(test)]
    tree = _parsed(code)
    if len(cases) < 2 or tree is None:
        return False
    streams = [list(_leaves(tree, text)) for text in (False, True)]
    inputs, outputs = ([leaf for case in cases for leaf in case[side]] for side in (0, 1))
    if any(_held(stream, [inputs, outputs]) == 2 for stream in streams):
        return True
    ways = ([given + answer for given, answer in cases], [answer + given for given, answer in cases])
    most = max(_held(stream, parts) for stream in streams for parts in ways)
    return most >= max(2, SHARE * len(cases))


def _parsed(text: str) -> ast.AST | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _cases(test: str) -> Iterator[tuple[Leaves, Leaves]]:
    """Inputs and outputs of the comparisons of a call with constants in a test."""
    for node in ast.walk(_parsed(test) or ast.Module([], [])):
        match node:
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                sides = (left, right)
            case ast.Call(args=[left, right, *_]) if "close" in ast.unparse(node.func):
                sides = (left, right)
            case _:
                continue
        for call, answer in (sides, sides[::-1]):
            calls = [
                n
                for n in ast.walk(call)
                if isinstance(n, ast.Call) and not any(isinstance(a, ast.Call) for a in n.args)
            ]
            if calls and (leaves := list(_leaves(answer, False))):
                given = [leaf for arg in calls[0].args for leaf in _leaves(arg, False)]
                if given:
                    yield given, leaves


def _leaves(node: ast.AST, text: bool) -> Iterator[Any]:
    """The constants below a node in order; with `text`, those in text that is Python instead of the text."""
    value = _constant(node)
    if value is not None:
        inner = _parsed(value[0]) if text and isinstance(value[0], str) and len(value[0]) > 1 else None
        found = list(_leaves(inner, False)) if inner is not None else []
        yield from found or value
        return
    for child in _in_order(node):
        yield from _leaves(child, text)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            yield from (part for part in (key, value) if part is not None)
    elif isinstance(node, ast.IfExp):  # the source has the value first
        yield from (node.test, node.body, node.orelse)
    elif isinstance(node, ast.Assign):
        yield from (*node.targets, node.value)
    else:
        yield from ast.iter_child_nodes(node)


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
            if a and b and _number(a[0], b[0]):
                try:
                    return [_OPERATORS[type(op)](a[0], b[0])]
                except (ArithmeticError, TypeError):
                    return None
            if a and b and isinstance(op, ast.Add) and type(a[0]) is type(b[0]) is str:
                return [a[0] + b[0]]
    return None


def _number(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and abs(value) < 1 << 64 for value in values)


def _held(stream: Leaves, parts: list[Leaves]) -> int:
    """How many of `parts` are in the stream, each in constants of its own."""
    rest, held = list(stream), 0
    for part in sorted(parts, key=len, reverse=True):
        at = _find(rest, part)
        if at >= 0:
            held += 1
            rest[at : at + len(part)] = [None]
    return held


def _find(stream: Leaves, part: Leaves) -> int:
    size = len(part)
    ends = len(stream) - size + 1
    return next((i for i in range(ends) if stream[i] == part[0] and stream[i : i + size] == part), -1)
