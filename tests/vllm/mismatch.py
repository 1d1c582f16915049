"""vLLM's bf16 beside the trainer's: `.venv-vllm/bin/python -m tests.vllm.mismatch` writes the figures.

Completions are sampled at temperature 1 and scored, teacher-forced, by our model in bf16 and in fp32. An
expert is flipped where the states that reach a gate in vLLM choose it and those in our model do not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import model
from model.transformer import Transformer
from rollout.settings import RolloutSettings
from rollout.types import SamplingParams
from rollout.vllm.engine import VllmEngine
from rollout.vllm.self_test import compare
from tests.bench.measure import record
from tests.small import prompt, random_prompts
from tests.vllm.networks import LATENT, LENGTHS, MOE, network

SAMPLING = SamplingParams(max_tokens=64, n=4, seed=0, ignore_eos=True)


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """What reaches each module while the context lasts."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def note(at: int) -> Any:
        return lambda _, args: seen[at].append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

    hooks = [module.register_forward_pre_hook(note(at)) for at, module in enumerate(modules)]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def flipped(engine: VllmEngine, net: Transformer, sequences: list[tuple[int, ...]]) -> float:
    """Share of expert choices that vLLM's states would make otherwise, over all tokens and layers."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    theirs = [m for m in runner.get_model().modules() if type(m).__name__ == "DeepseekV2MoE"]
    ours = net.moe_layers()[: len(theirs)]
    other = total = 0
    one = SamplingParams(max_tokens=1, temperature=0.0)
    for ids in sequences:
        with inputs_of(theirs) as there:
            list(engine.generate([prompt(*ids)], one))
        with inputs_of(list(ours)) as here:
            net.logits(torch.tensor([ids]))
        for moe, a, b in zip(ours, there, here, strict=True):
            mine, its = moe.gate(b[0][: len(ids)])[0], moe.gate(a[0][: len(ids)])[0]
            other += sum(len(set(x) - set(y)) for x, y in zip(mine.tolist(), its.tolist(), strict=True))
            total += mine.numel()
    return other / total


def measure(name: str, path: Path) -> dict[str, Any]:
    """One model's figures."""
    engine = VllmEngine(path, RolloutSettings(dtype="bfloat16"))
    rollouts = list(engine.generate(random_prompts(engine.vocab_size, LENGTHS), SAMPLING))
    bf16, fp32 = (model.load(path, dtype=dtype).eval() for dtype in (torch.bfloat16, torch.float32))
    sequences = [(*r.prompt.token_ids, *r.token_ids) for r in rollouts[:8]]
    out = {
        "model": name,
        "against_bf16": asdict(compare(rollouts, bf16, 1.0)),
        "against_fp32": asdict(compare(rollouts, fp32, 1.0)),
        "flipped_experts": flipped(engine, bf16, sequences),
    }
    engine.close()
    for key in ("against_bf16", "against_fp32"):
        del out[key]["regret"]  # it means nothing for sampled tokens
    return out


def main() -> None:
    """Measure and write docs/results/bench-vllm-mismatch.json."""
    torch.set_num_threads(1)
    rows = []
    for name, config in (("tiny MoE", MOE), ("latent 512 + 64", LATENT)):
        with tempfile.TemporaryDirectory() as folder:
            model.save(network(config, seed=0), folder)
            rows.append(measure(name, Path(folder)))
            print(rows[-1], flush=True)
    print(
        record("vllm-mismatch", {"unit": "nats a token, |vLLM bf16 - ours|, random weights", "models": rows})
    )


if __name__ == "__main__":
    main()
