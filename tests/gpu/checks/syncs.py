"""The host never waits for the GPU inside a micro-batch: torch raises where it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from model import ModelConfig, Transformer
from model.dense import DensePolicy
from model.policy import Policy
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.pack import pack
from tests.gpu.checks.compare import SMALL, objective, rollouts, true

SUMMARY = "no wait of the host while micro-batches are scored, computed forward and backward"
LENGTHS = (100, 300, 17, 512, 64, 255)


def dense(config: ModelConfig) -> DensePolicy:
    """A Qwen2 of about the size of `config`."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32 * config.num_attention_heads,
        "num_key_value_heads": 2,
        "vocab_size": config.vocab_size,
    }
    shape = Qwen2Config(
        **sizes,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
    )
    return DensePolicy(Qwen2ForCausalLM(shape))


def run(
    device: torch.device,
    config: ModelConfig = SMALL,
    lengths: Sequence[int] = LENGTHS,
    micro_tokens: int = 512,
) -> dict[str, Any]:
    """Claims, a policy each."""
    made: dict[str, Callable[[], Policy]] = {
        "native": lambda: Transformer(config, seed=0),
        "native, recomputed": lambda: Transformer(config, seed=0),
        "dense": lambda: dense(config),
        "dense, recomputed": lambda: dense(config),
    }
    claims, waits = [], {}
    for name, make in made.items():
        optim = OptimSettings(precision="bfloat16", recompute="recomputed" in name)
        learner = Learner(make().to(device).train(), optim, 100, mtp_coef=0.1)
        batch = pack(rollouts(config.vocab_size, lengths), micro_tokens)
        reference = learner.policy.frozen()
        with mock.patch.object(learner, "_step", lambda sums: {}):  # one wait an update is meant, in there
            for strict in (False, True):  # kernels compile and tables fill the first time
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                    torch.cuda.set_sync_debug_mode("error" if strict else "default")
                try:
                    learner.policy_update(batch, objective(), None, reference)
                    learner.supervised_update(batch)
                except RuntimeError as error:
                    waits[name] = f"{error!r:.500}"
                finally:
                    if device.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
                learner.weights.clear()
        claims.append(
            true(f"{name}: the host waits nowhere in {len(batch.parts)} micro-batches", name not in waits)
        )
    return {"waits": waits, "claims": claims}
