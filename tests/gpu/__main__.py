"""What a GPU must show: `python3 -m tests.gpu [--seconds N] [--out DIR] [NAME ...]`, or `make gpu-check`.

Each check is a process of its own with a limit of time, so that neither a crash nor a lost CUDA context
reaches the next. What others stand on comes first. When time is short the rest is skipped by name; a second
call with names runs those alone. A result is written when it is there:

    DIR/results.jsonl       a line a check: name, seconds, claims, what else was measured
    DIR/gpu-MODEL.json      at the end: these and, of other checks, what an earlier call found

Only torch and what a model needs is imported; tyro, rich, git and a network are not needed. FSDP2 on NCCL is
no check yet: the code for it does not exist.

Exit codes: 0 all ran and all claims hold, 1 some did not, 2 no GPU, an unknown name or
a folder that cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.gpu.checks.compare import holds, show

ROOT = Path(__file__).parents[2]
CHECKS = {
    "machine": 12,
    "network": 18,
    "attention": 44,
    "syncs": 27,
    "engine": 25,
    "zero": 45,
    "policy": 43,
    "logprobs": 12,
    "transport": 15,
    "fp8_kernels": 76,
    "fp8_layers": 44,
    "fp8_rollouts": 41,
    "moe": 56,
    "decode": 20,
}
"""Modules of `tests.gpu.checks` in the order in which they run, and the seconds that each should take."""
SLACK = 2.5
"""Times its seconds that a check may take where there is time."""


def child(name: str, file: Path, limit: float) -> dict[str, Any]:
    """Run check `name` for at most `limit` seconds; its result, a missed claim where it left none."""
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.gpu.child", name, str(file)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit code {process.wait(timeout=limit)}"
        except subprocess.TimeoutExpired:
            ended = f"still running after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started goes with it
            process.wait()
        result: dict[str, Any] = {}
        if file.exists():
            result = json.loads(file.read_text())
        else:
            log.seek(0)
            result["log"] = log.read()[-4000:]
            result["claims"] = [{"claim": f"{name} runs: {ended}", "value": 0.0, "at_least": 1.0}]
    return {"check": name, "seconds": round(time.monotonic() - began, 1), **result}


def run(names: list[str], seconds: float, out: Path) -> dict[str, dict[str, Any]]:
    """Results by name, each written to `out` when it is there; skipped ones have no claims."""
    deadline, results = time.monotonic() + seconds, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            left = deadline - time.monotonic()
            if left < CHECKS[name]:
                result = {"check": name, "skipped": f"{left:.0f} s left of {CHECKS[name]}", "claims": []}
            else:
                print(f"{name} ..", flush=True)
                limit = min(left, SLACK * CHECKS[name])
                result = child(name, Path(folder) / f"{name}.json", limit)
                show(name, result)
            results[name] = result
            with (out / "results.jsonl").open("a") as lines:
                lines.write(json.dumps(result) + "\n")
    return results


def summary(out: Path, gpu: str, results: dict[str, dict[str, Any]]) -> Path:
    """Write the results of this model of GPU: these, and of other checks what an earlier call found."""
    path = out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower().removeprefix('nvidia ')).strip('-')}.json"
    before = json.loads(path.read_text())["checks"] if path.exists() else {}
    found = before | {name: result for name, result in results.items() if "skipped" not in result}
    ordered = {name: found[name] for name in CHECKS if name in found}
    path.write_text(json.dumps({"gpu": gpu, "checks": ordered}, indent=1) + "\n")
    return path


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu", description="What a GPU must show.")
    parser.add_argument("--seconds", type=float, default=480.0, help="of all checks together (default 480)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/results", help="folder of results (default docs/results)"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)} (default: all)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in CHECKS]:
        print(f"error: no check {unknown[0]!r}; there are: {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check: no GPU that torch can use here, so there is nothing to check", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.jsonl").open("a").close()
    except OSError as error:
        print(f"error: --out {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    names = [name for name in CHECKS if name in options.names] or list(CHECKS)
    results = run(names, options.seconds, options.out)
    path = summary(options.out, torch.cuda.get_device_name(0), results)
    missed = [name for name, result in results.items() if not all(map(holds, result["claims"]))]
    skipped = [name for name, result in results.items() if "skipped" in result]
    for what, which in (("missed", missed), ("skipped", skipped)):
        if which:
            print(f"{what}: {' '.join(which)}   (python3 -m tests.gpu --out {options.out} {' '.join(which)})")
    print(f"{len(results) - len(missed) - len(skipped)} of {len(results)} checks hold: {path}")
    return 1 if missed or skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
