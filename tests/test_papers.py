"""docs/PAPERS.md leads where it says: every symbol exists, every equation of the architecture is there."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "PAPERS.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| .+? \| `((?:model|pipeline)\.[\w.]+)` \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("equation", "symbol"), ROWS)
def test_the_symbol_exists(equation, symbol):
    parts = symbol.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            assert hasattr(found, name), f"{equation}: no {symbol}"
            found = getattr(found, name)
        return
    pytest.fail(f"{equation}: no module of {symbol}")


def test_every_equation_of_the_architecture_is_in_the_table():
    told: set[int] = set()
    for equation, _ in ROWS:
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", equation.partition("Eq. ")[2]):
            told |= set(range(int(first), int(last or first) + 1))
    assert set(range(1, 26)) <= told


def test_every_file_that_is_named_exists():
    for file in re.findall(r"`([\w/.]+\.(?:py|toml))`", TEXT):
        assert (ROOT / file).is_file(), file
