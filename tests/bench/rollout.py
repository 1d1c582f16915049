"""Whole rollouts: the native engine against transformers' generate, 64 prompts x 8 samples, ragged lengths.

The peer generates batches of complete groups, each until its longest row ends. It has its best batch size and
kernels, found first on short completions, and with one batch a round: all batches would take an hour.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rollout.native.engine import NativeEngine
from tests.bench import _rollout
from tests.bench._peer import CONFIG, ours, theirs
from tests.bench._rollout import NEW, PROMPTS, SAMPLES, ragged_prompts, sample_ours, sample_theirs
from tests.bench.measure import Timing

SUMMARY = "rollouts of 64 prompts x 8 samples, up to 512 tokens, against transformers' generate"
ROUNDS = 3
BATCHES = (16, 32, 64)
SETTINGS = (("sdpa", "eager"), ("sdpa", "grouped_mm"), ("eager", "grouped_mm"))


def best_setting() -> tuple[tuple[str, str], int, dict[str, float]]:
    """Kernels and batch with which the peer generates most tokens a second; and the rates of all of them."""
    prompts = ragged_prompts(PROMPTS, CONFIG.vocab_size, seed=1)
    full, found = _rollout.NEW, {}
    _rollout.NEW = 96
    try:
        for setting in SETTINGS:
            peer = theirs(ours(), *setting).eval()
            for batch in BATCHES:
                begin = time.perf_counter()
                tokens = sample_theirs(peer, prompts[: batch // SAMPLES], 0)
                found[setting, batch] = tokens / (time.perf_counter() - begin)
    finally:
        _rollout.NEW = full
    setting, batch = max(found, key=lambda key: found[key])
    return setting, batch, {f"{' '.join(s)}, batch {b}": rate for (s, b), rate in found.items()}


def apart(who: str, batch: int) -> dict[str, float]:
    """Generated once in a process of its own, for the memory that it takes."""
    command = [sys.executable, "-m", "tests.bench._rollout", who, str(batch)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    tokens, seconds, size = done.stdout.split()[-3:]
    return {"tokens": int(tokens), "seconds": float(seconds), "bytes": int(size)}


def run() -> dict[str, Any]:
    """Tokens a second of both, round by round; memory that sampling adds to each process."""
    setting, batch, tried = best_setting()
    print(f"  transformers is fastest with {setting}, batch {batch}", flush=True)
    net = ours().eval()
    engine, peer = NativeEngine(net), theirs(net, *setting).eval()
    costs: dict[str, list[float]] = {"ours": [], "transformers": []}  # seconds a token
    for number in range(ROUNDS):
        prompts = ragged_prompts(PROMPTS, CONFIG.vocab_size, seed=10 + number)
        for name in ("ours", "transformers") if number % 2 == 0 else ("transformers", "ours"):
            begin = time.perf_counter()
            if name == "ours":
                tokens = sample_ours(engine, prompts, number)
            else:
                tokens = sample_theirs(peer, prompts[: batch // SAMPLES], number)
            costs[name].append((time.perf_counter() - begin) / tokens)
    mine, yours = (Timing(tuple(costs[name])) for name in costs)
    memory = {"ours, 512 rows": apart("ours", 512), f"transformers, {batch} rows": apart("theirs", batch)}
    return {
        "claims": [
            {"claim": "tokens a second, against generate", "value": mine.ratio(yours), "at_least": 8.0}
        ],
        "tokens_per_s": {"ours": 1 / mine.median, "transformers": 1 / yours.median},
        "workload": {"prompts": PROMPTS, "samples": SAMPLES, "most new tokens": NEW},
        "transformers_tried_at_96_tokens": tried,
        "memory_of_sampling": memory,
    }
