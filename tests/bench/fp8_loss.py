"""Does FP8 learn as bf16 does? A small pretraining in fp32, bf16 and FP8, five seeds, same data and start.

DeepSeek-V3 (arXiv:2412.19437, Sec. 3.3) keeps the loss within 0.25 % of bf16's at 671B. Here a 0.5M-parameter
model with ragged widths (no dimension a multiple of 128), 300 updates; the mean loss of the last 50 counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from typing import Any

import torch

from model import TINY
from model.transformer import Transformer
from pipeline.data.traces import corpus
from pipeline.settings.supervised import PretrainSettings
from pipeline.stages.pretrain import batches
from pipeline.train.learner import Learner
from rollout.text.tokenizer import train_tokenizer

SUMMARY = "a pretraining in fp32, bf16 and FP8, five seeds: mean loss of the last 50 updates"
MICRO_TOKENS = 4096
SEEDS, STEPS, LAST = range(5), 300, 50
PRECISIONS = ("float32", "bfloat16", "fp8")
VOCABULARY = 400


def train(precision: str, seed: int, tokenizer: Any) -> list[float]:
    """Loss of every update."""
    config = PretrainSettings(seed=seed, steps=STEPS, batch_tokens=512)
    shape = dataclasses.replace(
        TINY,
        vocab_size=len(tokenizer),
        hidden_size=144,
        intermediate_size=320,
        moe_intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        n_routed_experts=8,
        num_nextn_predict_layers=0,
        initializer_range=0.05,
    )
    optim = dataclasses.replace(config.optim, precision=precision)
    net = Transformer(shape, seed=seed).train()
    learner = Learner(net, optim, STEPS)
    return [learner.supervised_update(batch)["loss/lm"] for batch in batches(config, tokenizer, MICRO_TOKENS)]


def run() -> dict[str, Any]:
    """Fifteen runs; the claims compare means over the seeds, the rest is there to be looked at."""
    torch.set_num_threads(1)
    config = PretrainSettings()
    texts = itertools.islice(corpus(config.task, config.pool, 0), 5_000)
    tokenizer = train_tokenizer(texts, VOCABULARY)
    runs: dict[str, list[dict[str, Any]]] = {precision: [] for precision in PRECISIONS}
    for seed, precision in itertools.product(SEEDS, PRECISIONS):
        begin = time.monotonic()
        losses = train(precision, seed, tokenizer)
        last = statistics.fmean(losses[-LAST:])
        print(f"  seed {seed} {precision:9} {last:.5f}  {time.monotonic() - begin:.0f} s", flush=True)
        curve = [round(statistics.fmean(losses[at : at + LAST]), 5) for at in range(0, STEPS, LAST)]
        runs[precision].append({"seed": seed, f"last_{LAST}": last, f"mean_of_each_{LAST}": curve})
    return {"runs": runs, **compare({name: [r[f"last_{LAST}"] for r in of] for name, of in runs.items()})}


def compare(last: dict[str, list[float]]) -> dict[str, Any]:
    """Claims from each precision's last losses, seed by seed."""
    mean = {name: statistics.fmean(losses) for name, losses in last.items()}
    others = last["float32"] + last["bfloat16"]
    inside = min(others) <= mean["fp8"] <= max(others)

    def paired(a: str, b: str) -> list[float]:
        """Relative difference in percent, seed by seed: same data, same start."""
        return [100 * (x / y - 1) for x, y in zip(last[a], last[b], strict=True)]

    return {
        "mean": mean,
        "deviation_over_seeds": {name: statistics.stdev(losses) for name, losses in last.items()},
        "percent_apart": {
            "fp8 - bfloat16": paired("fp8", "bfloat16"),
            "fp8 - float32": paired("fp8", "float32"),
            "bfloat16 - float32": paired("bfloat16", "float32"),
        },
        "claims": [
            {
                "claim": "FP8's mean loss over the seeds, away from bf16's",
                "value": 100 * abs(mean["fp8"] / mean["bfloat16"] - 1),
                "at_most": 0.5,
                "unit": "%",
            },
            {
                "claim": "FP8's mean loss lies between the least and the largest of the bf16 and fp32 runs",
                "value": float(inside),
                "at_least": 1.0,
                "unit": "(1 = yes)",
            },
        ],
    }
