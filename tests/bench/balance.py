"""Balancing without an auxiliary loss: an expert with a head start loses it where the bias is stepped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from model import TINY, Transformer
from pipeline.train.logprobs import token_logprobs
from tests.bench.measure import RESULTS

SUMMARY = "router balancing by bias alone, from a skewed start, 300 steps"
STEPS, ROWS, TOKENS = 300, 16, 128
HEAD_START, GAMMA = 0.3, 0.005
CONFIG = replace(TINY, num_hidden_layers=3, num_nextn_predict_layers=0, initializer_range=0.05)


def violations(gamma: float) -> list[float]:
    """Max violation (arXiv:2408.15664, Eq. 4) of the worst layer, a step; loads are sums of 20 steps."""
    torch.set_num_threads(1)
    net = Transformer(CONFIG, seed=0).train()
    for moe in net.moe_layers():
        moe.gate.e_score_correction_bias[0] = HEAD_START
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    loads, out = [], []
    for _ in range(STEPS):
        # Random walks: something to learn, and another batch each step.
        ids = torch.randint(1, 4, (ROWS, TOKENS), generator=generator).cumsum(1) % CONFIG.vocab_size
        logprobs, _ = token_logprobs(
            net.hidden(ids)[:, :-1].flatten(0, 1), net.head, ids[:, 1:].flatten(), entropy=False
        )
        (-logprobs.mean()).backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        loads.append(net.router_load().float())
        net.update_router_bias(gamma)
        recent = torch.stack(loads[-20:]).sum(0)
        out.append(float((recent.amax(-1) / recent.mean(-1) - 1).max()))
    return out


def plot(curves: dict[str, list[float]]) -> None:
    """docs/results/balance.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve, label=name)
    axes.axhline(0.1, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="max violation, last 20 steps", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "balance.svg")
    pyplot.close(figure)


def run() -> dict[str, Any]:
    """With the bias update and without."""
    curves = {"bias update": violations(GAMMA), "no update": violations(0.0)}
    plot(curves)
    stepped, fixed = curves.values()
    return {
        "claims": [
            {"claim": "lowest violation, bias updated", "value": min(stepped), "at_most": 0.1},
            {
                "claim": "violation at the end, bias updated",
                "value": stepped[-1],
                "at_most": 0.1,
            },
            {"claim": "lowest violation, bias fixed", "value": min(fixed), "at_least": 0.1},
        ],
        "curves": {name: [round(v, 4) for v in curve[::10]] for name, curve in curves.items()},
        "gamma": GAMMA,
        "head_start_of_expert_0": HEAD_START,
    }
