"""`python -m tests.gpu.child NAME FILE`: run one check on the GPU and write its result as JSON."""

from __future__ import annotations

import json
import sys
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline.run.environment import git


def result(name: str, device: torch.device) -> dict[str, Any]:
    """Of check `name`; an exception becomes a claim that does not hold."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git("rev-parse", "HEAD"),  # empty where there is no git
        "gpu": torch.cuda.get_device_name(device),
    }
    try:
        module = import_module(f"tests.gpu.checks.{name}")
        found |= {"about": module.SUMMARY, **module.run(device)}
    except Exception as error:
        failed = {"claim": f"{name} runs: {error!r:.300}", "value": 0.0, "at_least": 1.0}
        found |= {"log": traceback.format_exc()[-4000:], "claims": [failed]}
    return found


def main(name: str, file: str) -> None:
    """The process."""
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is compared with fp32
    partial = Path(f"{file}.partial")
    partial.write_text(json.dumps(result(name, torch.device("cuda", 0)), default=str))
    partial.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
