"""One GRPO step against TRL's GRPOTrainer: native MoE and dense Llama, groups all spread and half flat."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from pipeline.errors import UserError

SUMMARY = "one GRPO step, 4 prompts x 8 completions of 128 tokens, against TRL's GRPOTrainer"
STEPS, ROUNDS = 3, 3
CASES = {
    ("moe", "float32", "spread"): 2.7,
    ("moe", "float32", "flat"): 3.4,
    ("dense", "float32", "spread"): 1.3,
    ("dense", "float32", "flat"): 1.9,
    ("moe", "bfloat16", "spread"): None,
    ("dense", "bfloat16", "spread"): None,
}
"""How many times longer TRL's step takes, at least; bf16 is reported without a bound."""


def one(who: str, case: tuple[str, str, str], folder: str) -> dict[str, Any]:
    """Steps of one of the two, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench._grpo", who, *case, folder, str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"median_s": statistics.median(found["seconds"])}


def run() -> dict[str, Any]:
    """Rounds of ours and theirs in turn; a claim's ratio is the median of the rounds'."""
    claims, details = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for case, bound in CASES.items():
            name = " ".join(case)
            rounds = [{who: one(who, case, folder) for who in ("ours", "trl")} for _ in range(ROUNDS)]
            ratio = statistics.median(r["trl"]["median_s"] / r["ours"]["median_s"] for r in rounds)
            memory = statistics.median(r["trl"]["peak_bytes"] / r["ours"]["peak_bytes"] for r in rounds)
            print(f"{name}: {ratio:.2f}x, memory {memory:.2f}x", flush=True)
            details[name] = {"ratio": ratio, "rounds": rounds}
            if bound is not None:
                claims.append({"claim": f"GRPO step, {name}", "value": ratio, "at_least": bound})
            claims.append({"claim": f"peak memory, {name}", "value": memory, "at_least": 1.0})
    return {"claims": claims, "cases": details}
