"""Peak memory of a log-probability pass at DeepSeek-V3's vocabulary: in chunks, and with whole logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

SUMMARY = "peak memory of log-probabilities at vocabulary 129,280, forward and backward"
TOKENS, WIDTH, VOCABULARY = 2048, 64, 129_280
PASS = f"""
import sys, torch
from torch import nn
from pipeline.train.logprobs import token_logprobs
from tests.bench.measure import peak_bytes
torch.set_num_threads(1)
torch.manual_seed(0)
head = nn.Linear({WIDTH}, {VOCABULARY}, bias=False)
hidden = torch.randn({TOKENS}, {WIDTH}, requires_grad=True)
targets = torch.randint({VOCABULARY}, ({TOKENS},))
head(hidden[:8]).sum().backward()
before = peak_bytes()
if sys.argv[1] == "chunks":
    logprobs, _ = token_logprobs(hidden, head, targets, entropy=False)
else:
    logprobs = head(hidden).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
logprobs.mean().backward()
print(peak_bytes() - before, float(logprobs.mean()))
"""


def peak(kind: str) -> tuple[int, float]:
    """Bytes that the pass adds to the process's peak, in a process of its own; and the mean it computes."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PASS, kind], cwd=root, capture_output=True, text=True, check=True
    )
    size, mean = done.stdout.split()
    return int(size), float(mean)


def run() -> dict[str, Any]:
    """Both passes compute the same; the claim is the ratio of what they add to memory."""
    (chunks, ours), (whole, theirs) = peak("chunks"), peak("whole")
    assert abs(ours - theirs) < 1e-4, f"{ours} is not {theirs}"
    return {
        "claims": [
            {
                "claim": "memory of the pass, of that with whole logits",
                "value": chunks / whole,
                "at_most": 0.25,
            }
        ],
        "bytes": {"chunks": chunks, "whole logits": whole},
        "tokens": TOKENS,
        "vocabulary": VOCABULARY,
    }
