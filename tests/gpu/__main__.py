"""`make gpu-check [ARGS="NAME ..."]`: run the checks, print a table, write docs/results/gpu-NAME.json.

A check is a module of this folder with `SUMMARY`, one line, and `run(device) -> dict`, which has under
`claims` what `tests.bench` has there: {"claim", "value", "at_least" or "at_most", "unit"}. Agreement is a
claim too, of an error at most so large. A check that raises is recorded as failed, and the others go on.

Exit codes: 0 all claims hold, 1 some do not, 2 no GPU or an unknown name.
"""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.bench.__main__ import holds, show
from tests.bench.measure import record

ORDER = ("fp8_kernels", "fp8_layers", "network", "engine", "attention", "logprobs", "speed")
"""Checks in the order in which they run: what others stand on comes first. Any other module comes after."""


def names() -> list[str]:
    """The checks there are."""
    found = {file.stem for file in (Path(__file__).parent / "checks").glob("*.py")} - {"__init__", "compare"}
    return [*ORDER, *sorted(found - set(ORDER))]


def machine(device: torch.device) -> dict[str, Any]:
    """What ran: the GPU and the versions that its results depend on."""
    if device.type != "cuda":
        return {"gpu": None}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
    }


def run(name: str, device: torch.device) -> dict[str, Any]:
    """Result of one check; an exception becomes a claim that does not hold."""
    try:
        module = import_module(f"tests.gpu.checks.{name}")
        print(f"{name}: {module.SUMMARY}", flush=True)
        return module.run(device)
    except Exception as error:
        traceback.print_exc()
        failed = {"claim": f"{name} runs: {error!r:.300}", "value": 0.0, "at_least": 1.0, "unit": "(1 = yes)"}
        return {"claims": [failed]}


def main(wanted: list[str]) -> int:
    """Run `wanted`, or all."""
    known = names()
    if unknown := [name for name in wanted if name not in known]:
        print(f"error: no check {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check: no GPU that torch can use here, so there is nothing to check", file=sys.stderr)
        return 2
    device, kept = torch.device("cuda", 0), True
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is compared with fp32
    for name in wanted or known:
        result = run(name, device)
        path = record(name, {**machine(device), **result}, prefix="gpu")
        show(result["claims"])
        print(f"{name}: {path}", flush=True)
        kept = kept and all(map(holds, result["claims"]))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
