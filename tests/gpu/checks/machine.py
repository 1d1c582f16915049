"""What runs here: GPU, versions, memory; and what it does at best, to compare everything else with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from typing import Any

import torch

from tests.gpu.checks.compare import measured, seconds

SUMMARY = "GPU and versions; bandwidth of a copy; the largest product in bf16"
PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "tokenizers", "numpy")


def run(device: torch.device, size: int = 8192, copied: int = 2 << 30) -> dict[str, Any]:
    """Claims: figures without bounds, for a product of `size` cubed and a copy of that many bytes."""
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    x = torch.randn(size, size, device=device).to(torch.bfloat16)
    a = torch.empty(copied, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    rate = 2e-12 * size**3 / seconds(lambda: x @ x, device)
    bandwidth = 2e-12 * copied / seconds(lambda: b.copy_(a), device)
    return {
        "capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
        "driver": driver(),
        "python": platform.python_version(),
        "packages": versions(),
        "memory_bytes": total,
        "claims": [
            measured("free memory", free / 2**30, "GiB"),
            measured("copy within the GPU, read and written", bandwidth, "TB/s"),
            measured(f"bf16 product {size}^3", rate, "TFLOP/s"),
        ],
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def driver() -> str:
    """Version of NVIDIA's driver; empty where nvidia-smi is not there to ask."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return ""
