"""`make bench [ARGS="NAME ..."]`: run the benchmarks, print a table, write docs/results/bench-NAME.json.

A benchmark is a module of this folder with `SUMMARY`, one line, and `run() -> dict`: under `claims`, a list
of {"claim", "value", "at_least" or "at_most", "unit"}; whatever else it measured beside that.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from tests.bench.measure import record

NOT_BENCHMARKS = {"__init__", "__main__", "measure"}


def names() -> list[str]:
    """The benchmarks there are; a file whose name begins with an underscore holds what several share."""
    found = {file.stem for file in Path(__file__).parent.glob("*.py")} - NOT_BENCHMARKS
    return sorted(name for name in found if not name.startswith("_"))


def holds(claim: dict[str, Any]) -> bool:
    """Whether the measured value keeps its bound."""
    return bool(
        claim["value"] >= claim.get("at_least", float("-inf"))
        and claim["value"] <= claim.get("at_most", float("inf"))
    )


def show(claims: list[dict[str, Any]]) -> None:
    """Measured value beside bound, a row a claim."""
    table = Table("claim", "measured", "bound", "")
    for claim in claims:
        bound = f">= {claim['at_least']:g}" if "at_least" in claim else f"<= {claim.get('at_most', 0):g}"
        unit = claim.get("unit", "x")
        table.add_row(claim["claim"], f"{claim['value']:.4g} {unit}", bound, "" if holds(claim) else "MISSED")
    Console().print(table)


def main(wanted: list[str]) -> int:
    """Run `wanted`, or all; 1 where a bound was missed, 2 for an unknown name or missing data."""
    known = names()
    if unknown := [name for name in wanted if name not in known]:
        print(f"error: no benchmark {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    kept, lacking = True, False
    for name in wanted or known:
        module = import_module(f"tests.bench.{name}")
        print(f"{name}: {module.SUMMARY}", flush=True)
        try:
            result = module.run()
        except UserError as error:
            print(f"error: {name} is left out: {error}", file=sys.stderr)
            lacking = True
            continue
        path = record(name, result)
        show(result["claims"])
        print(f"{name}: {path}", flush=True)
        kept = kept and all(map(holds, result["claims"]))
    return 2 if lacking else 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
