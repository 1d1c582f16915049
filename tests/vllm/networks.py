"""Checkpoints that vLLM's CPU build has a path for: a tiny MoE, DeepSeek-V3's own latent, SmolLM2-135M."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from model import TINY, ModelConfig
from model.transformer import Transformer
from tests.small import bias_gates

MOE = replace(TINY, initializer_range=0.08, max_position_embeddings=512, eos_token_id=2)
"""The tiny preset's shape, MTP module included; its latent is too small for the CPU's latent kernel."""
LATENT = replace(
    MOE, num_hidden_layers=2, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    q_lora_rank=64, num_attention_heads=2, num_nextn_predict_layers=0,
)  # fmt: skip
"""The one latent, 512 + 64, that vLLM's CPU kernel for latent attention knows."""

LENGTHS = (3, 40, 1, 15, 7, 7, 2, 33)
"""Of prompts, tokens."""


def network(config: ModelConfig, seed: int) -> Transformer:
    """Random weights with biased gates, so that a lost bias would show."""
    return bias_gates(Transformer(config, seed).eval(), 0.2, torch.Generator().manual_seed(seed))


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M as a checkpoint, by the project's own stage."""
    from pipeline.__main__ import main

    assert main(["smollm2", "--config", "configs/smollm2/smollm2.toml", "--runs", str(folder)]) == 0
    return folder / "smollm2/smollm2/model"
