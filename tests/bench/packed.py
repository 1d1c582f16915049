"""Training on ragged sequences: our packed rows against transformers' padded batch, real tokens a second."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.pack import Example, mean_weights, pack
from tests.bench._peer import CONFIG, ours, theirs
from tests.bench.measure import interleave

SUMMARY = "packed ragged sequences, 32 to 512 tokens, against transformers' padded step"
SEQUENCES, SHORTEST, LONGEST = 24, 32, 512
IGNORE = -100
ROUNDS = 5
MICRO_TOKENS = 4096


def run() -> dict[str, Any]:
    """Both train on the same sequences, lengths log-uniform; the ratio is of their seconds."""
    rng = random.Random(0)
    lengths = [round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST)))) for _ in range(SEQUENCES)]
    sequences = [[rng.randrange(CONFIG.vocab_size) for _ in range(n)] for n in lengths]

    weights = mean_weights([[True] * n for n in lengths])
    batch = pack([Example(s, w) for s, w in zip(sequences, weights, strict=True)], MICRO_TOKENS)
    learner = Learner(ours().train(), OptimSettings(lr=1e-4), 1000)

    most = max(lengths)
    ids = torch.zeros(SEQUENCES, most, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = labels[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1

    def padded(attention: str, experts: str) -> Any:
        peer = theirs(ours(), attention, experts).train()
        adamw = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

        def step() -> None:
            for part in range(0, SEQUENCES, 8):
                rows = slice(part, part + 8)
                loss = peer(ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
                (loss * 8 / SEQUENCES).backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)

        return step

    peers = {
        f"transformers {a} {e}": padded(a, e) for a in ("eager", "sdpa") for e in ("eager", "grouped_mm")
    }
    timings = interleave({"ours packed": lambda: learner.supervised_update(batch), **peers}, ROUNDS)
    best = min(peers, key=lambda name: timings[name].median)
    ratio = timings["ours packed"].ratio(timings[best])
    return {
        "claims": [{"claim": f"real tokens a second, against {best}", "value": ratio, "at_least": 2.5}],
        "sequences": SEQUENCES,
        "tokens": sum(lengths),
        "micro_batches": len(batch.parts),
        "share_of_padding_in_the_padded_batch": 1 - sum(lengths) / (SEQUENCES * most),
        "timings": {name: timing.report() for name, timing in timings.items()},
    }
