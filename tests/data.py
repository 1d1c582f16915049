"""The benchmark files that some tests and benchmarks read: none is in this repository."""

from __future__ import annotations

import ast
import json
import os
import warnings
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from rewards.programs.helpers import preamble

FOLDER = Path(os.environ.get("R1_DATA") or Path(__file__).parents[2] / "shared" / "data")
"""R1_DATA, else `shared/data` beside the checkout."""


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file, by its name without the ending.

    Raises:
        UserError: it is not there.
    """
    path = FOLDER / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: set R1_DATA to the folder that holds {path.name}")
    with path.open(encoding="utf-8") as lines:  # not splitlines: a row may hold U+2028
        return [json.loads(line) for line in lines]


def checked_programs(name: str) -> list[tuple[str, list[str]]]:
    """Reference programs of humaneval or mbpp, each with the tests that it passes."""
    if name == "humaneval":
        return [
            (
                row["prompt"] + row["canonical_solution"],
                [
                    preamble(row["prompt"], row["entry_point"])
                    + f"\n{row['test']}\ncheck({row['entry_point']})"
                ],
            )
            for row in rows(name)
        ]
    return [
        (row["solution"], [row["test_setup_code"], *row["test_list"]])
        for row in rows(name)
        if row["reference_passes"]
    ]


def broken(program: str) -> str:
    """The program, with nothing in what its functions return."""

    class Emptied(ast.NodeTransformer):
        def visit_Return(self, node: ast.Return) -> ast.Return:
            return ast.Return(ast.Constant(None))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\w" in a published program
        tree = ast.parse(program)
    return ast.unparse(ast.fix_missing_locations(Emptied().visit(tree)))
