"""The examples run as they stand, use public names alone, and learn."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
GAIN = 0.5
"""Least gain in held-out accuracy; seeds 0, 1 and 2 gained 0.87 to 0.96."""


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_short_and_uses_public_names_of_the_packages(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    tree = ast.parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [part for n in nodes for part in [*(n.module or "").split("."), *(a.name for a in n.names)]]
    names += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert not [name for name in names if name.startswith("_") and not name.endswith("__")]


@pytest.mark.timeout(900)
def test_grpo_in_one_file_learns():
    done = subprocess.run(
        [sys.executable, "examples/grpo_in_one_file.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result.keys() == {"before", "after"} and 0 <= result["before"] <= result["after"] - GAIN
