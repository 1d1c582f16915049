"""Balancing without an auxiliary loss: an expert with a head start loses it, and keeps it where the bias stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from model import Transformer
from model.config import TINY
from pipeline.config import OptimConfig
from pipeline.learner import Learner
from pipeline.pack import Example, mean_weights, pack
from tests.bench.measure import RESULTS

SUMMARY = "router balancing by bias alone, from a skewed start, 300 steps"
STEPS, ROWS, TOKENS = 300, 16, 128
HEAD_START, GAMMA = 0.3, 0.005
CONFIG = replace(TINY, num_hidden_layers=3, num_nextn_predict_layers=0, initializer_range=0.05)


def violations(gamma: float) -> list[float]:
    """Max violation (arXiv:2408.15664, Eq. 4) of the worst layer at every step, over the last 20 steps' load."""
    torch.set_num_threads(1)
    net = Transformer(CONFIG, seed=0).train()
    for moe in net.moe_layers():
        moe.gate.e_score_correction_bias[0] = HEAD_START
    learner = Learner(net, OptimConfig(lr=1e-3, router_bias_gamma=gamma), STEPS, micro_rows=ROWS)
    generator = torch.Generator().manual_seed(0)
    loads, out = [], []
    for _ in range(STEPS):
        # Random walks: something to learn, and another batch each step.
        steps = torch.randint(1, 4, (ROWS, TOKENS), generator=generator).cumsum(1) % CONFIG.vocab_size
        weights = mean_weights([[True] * TOKENS] * ROWS)
        examples = [Example(ids, w) for ids, w in zip(steps.tolist(), weights, strict=True)]
        update = net.update_router_bias
        net.update_router_bias = lambda g: (loads.append(net.router_load().float()), update(g))  # type: ignore
        learner.supervised_update(pack(examples, TOKENS))
        net.update_router_bias = update  # type: ignore[method-assign]
        recent = torch.stack(loads[-20:]).sum(0)
        out.append(float((recent.amax(-1) / recent.mean(-1) - 1).max()))
    return out


def draw(curves: dict[str, list[float]]) -> None:
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
    draw(curves)
    return {
        "claims": [
            {"claim": "lowest violation, bias updated", "value": min(curves["bias update"]), "at_most": 0.1},
            {
                "claim": "violation at the end, bias updated",
                "value": curves["bias update"][-1],
                "at_most": 0.1,
            },
            {"claim": "lowest violation, bias fixed", "value": min(curves["no update"]), "at_least": 0.1},
        ],
        "curves": {name: [round(v, 4) for v in curve[::10]] for name, curve in curves.items()},
        "gamma": GAMMA,
        "head_start_of_expert_0": HEAD_START,
    }
