"""How an update of a dense policy grows: cost of a token in packed rows, peak memory of one long sequence.

The policy is a Llama of 14M parameters, in fp32 on one thread. Each figure is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

SUMMARY = (
    "dense 14M policy: cost of a token in packed rows of 512 to 8,192, memory of one sequence of 8k and 32k"
)
SEQUENCE = 512
ROWS = (512, 1024, 2048, 4096, 8192)
MASKED_MIB = 3334
"""Peak of 8,192 tokens with an s x s mask, before attention by sequence ends (docs/LOG.md)."""
UPDATE = """
import random, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from model.dense import DensePolicy
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.pack import Example, mean_weights, pack
from tests.bench.measure import peak_bytes
tokens, length, recompute, rounds = map(int, sys.argv[1:])
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=6, max_position_embeddings=tokens, tie_word_embeddings=False,
)
rng = random.Random(0)
sequences = [[rng.randrange(4096) for _ in range(length)] for _ in range(tokens // length)]
weights = mean_weights([[True] * length for _ in sequences])
batch = pack([Example(s, w) for s, w in zip(sequences, weights, strict=True)], tokens)
optim = OptimSettings(lr=1e-4, recompute=bool(recompute))
learner = Learner(DensePolicy(LlamaForCausalLM(config)).train(), optim, 1000)
seconds = []
for _ in range(1 + rounds):
    start = time.process_time()
    learner.supervised_update(batch)
    seconds.append(time.process_time() - start)
print(1e3 * min(seconds[1:] or seconds) / tokens, peak_bytes())
"""


def update(tokens: int, length: int, recompute: bool = False, rounds: int = 3) -> tuple[float, int]:
    """Processor milliseconds a token of the fastest update, and the peak bytes of its process."""
    command = [sys.executable, "-W", "ignore", "-c", UPDATE]
    command += map(str, (tokens, length, int(recompute), rounds))
    root = Path(__file__).parents[2]
    ms, peak = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    return float(ms), int(peak)


def run() -> dict[str, Any]:
    """Claims: the dearest row's token over the cheapest's; peaks against a mask's, and of 32k recomputed."""
    packed = {tokens: update(tokens, SEQUENCE)[0] for tokens in ROWS}
    single = {"8192": update(8192, 8192, rounds=1), "8192 recomputed": update(8192, 8192, True, rounds=1)}
    single["32768 recomputed"] = update(32_768, 32_768, True, rounds=0)
    mib = {name: peak / 2**20 for name, (_, peak) in single.items()}
    ratio = max(packed.values()) / min(packed.values())
    return {
        "claims": [
            {"claim": "a token in the dearest packed row over the cheapest", "value": ratio, "at_most": 1.2},
            {
                "claim": "peak memory, 8,192 tokens recomputed, of that with a mask",
                "value": mib["8192 recomputed"] / MASKED_MIB,
                "at_most": 0.5,
            },
            {
                "claim": "peak, 32,768 tokens recomputed",
                "value": mib["32768 recomputed"],
                "at_most": 6144,
                "unit": "MiB",
            },
        ],
        "ms_a_token": {"packed": packed, "one sequence": {name: ms for name, (ms, _) in single.items()}},
        "peak_mib": mib,
    }
