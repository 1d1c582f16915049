"""The checks of `tests.gpu`.

A run directory writes its config by tomli_w. Where only what a model needs is installed, a writer for the
settings of these checks stands in for it.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def toml(table: dict[str, Any], path: str = "") -> str:
    """A table as TOML."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"{json.dumps(key)} = {json.dumps(value, default=str)}\n" for key, value in plain.items()]
    for key in (key for key in table if key not in plain):
        name = f"{path}{json.dumps(key)}"
        lines.append(f"[{name}]\n{toml(table[key], f'{name}.')}")
    return "".join(lines)


if find_spec("tomli_w") is None:
    sys.modules["tomli_w"] = ModuleType("tomli_w")
    sys.modules["tomli_w"].dumps = toml  # type: ignore[attr-defined]
