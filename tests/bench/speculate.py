"""MTP speculation against plain decoding, on a tiny model that was trained with its MTP module.

Speculation changes no token: both generate the same rollouts and differ in time alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import model
from pipeline.__main__ import main
from rollout.native.engine import NativeEngine
from rollout.text.tokenizer import load_tokenizer, make_prompt
from rollout.types import Problem, Prompt, SamplingParams
from tests.bench.measure import interleave

SUMMARY = "speculative decoding with the MTP module, batch 1, 2 and 4, against plain decoding"
STEPS, LAYERS, ROUNDS, NEW, SAMPLES = 900, 8, 7, 96, 4
"""Updates of pretraining, and layers: of the tiny preset's three, the MTP module's one would be a third of
the cost of a step, which no model of this architecture that anybody serves comes near."""
QUESTIONS = ("3+4-5=?", "12-7+2=?", "9+8=?", "6+6-3+2=?", "11-4=?", "7+5-9=?", "2+3+4=?", "10-8+6=?")


def trained(folder: Path) -> Path:
    """The tiny base with more layers, pretrained for fewer updates than the chain takes."""
    flags = ["--num-hidden-layers", str(LAYERS), "--steps", str(STEPS), "--runs", str(folder), "--seed", "0"]
    assert main(["pretrain", "--config", "configs/tiny/pretrain.toml", *flags]) == 0
    return folder / "tiny" / "pretrain" / "model"


def run() -> dict[str, Any]:
    """Seconds for the same rollouts, at temperature 1 and greedy, by batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = trained(Path(folder))
        net, tokenizer = model.load(path, dtype=torch.float32).eval(), load_tokenizer(path)
    torch.set_num_threads(1)
    problems = [Problem(id=q, kind="math", question=q) for q in QUESTIONS]
    prompts = [make_prompt(tokenizer, problem, "r1-zero-short") for problem in problems]
    claims, table = [], {}
    for batch in (1, 2, 4, 32):
        for temperature in (1.0, 0.0):
            engines = {
                "plain": NativeEngine(net, max_batch=batch),
                "speculative": NativeEngine(net, max_batch=batch, speculate=True),
            }
            # A group to a prompt, as in RL: decoding is measured, not prefill.
            sampling = SamplingParams(max_tokens=NEW, temperature=temperature, n=max(SAMPLES, batch // 4))
            sampled = {name: rollouts(engine, prompts, sampling) for name, engine in engines.items()}
            assert sampled["plain"] == sampled["speculative"], "speculation must not change a token"
            tasks = {name: timed(engine, prompts, sampling) for name, engine in engines.items()}
            timings = interleave(tasks, ROUNDS)
            ratio = timings["speculative"].ratio(timings["plain"])
            name = f"batch {batch}, temperature {temperature:g}"
            stats = engines["speculative"].stats
            table[name] = {"ratio": ratio, "acceptance": stats.acceptance()}
            table[name] |= {kind: timing.median for kind, timing in timings.items()}
            if batch <= 4:
                claims.append({"claim": name, "value": ratio, "at_least": 1.3})
    return {"claims": claims, "pretraining_steps": STEPS, "layers": LAYERS, "table": table}


def rollouts(engine: NativeEngine, prompts: list[Prompt], sampling: SamplingParams) -> list[Any]:
    """Names and tokens, in order."""
    return sorted((r.index, r.sample, r.token_ids) for r in engine.generate(prompts, sampling))


def timed(engine: NativeEngine, prompts: list[Prompt], sampling: SamplingParams) -> Any:
    """The same, as a task."""
    return lambda: rollouts(engine, prompts, sampling)
