"""Checkpoints that vLLM's CPU build has a path for: a tiny MoE, DeepSeek-V3's own latent, SmolLM2-135M."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from model.config import TINY, ModelConfig
from model.transformer import Transformer
from rollout.types import Problem, Prompt

MOE = replace(TINY, initializer_range=0.08, max_position_embeddings=512, eos_token_id=2)
"""The tiny preset's shape, MTP module included; its latent is too small for the CPU's latent kernel."""
LATENT = replace(
    MOE, num_hidden_layers=2, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    q_lora_rank=64, num_attention_heads=2, num_nextn_predict_layers=0,
)  # fmt: skip
"""The one latent, 512 + 64, that vLLM's CPU kernel for latent attention knows."""


def network(config: ModelConfig, seed: int) -> Transformer:
    """Random weights with biased gates, so that a lost bias would show."""
    net = Transformer(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for moe in net.moe_layers():
            moe.gate.e_score_correction_bias.normal_(0, 0.2, generator=generator)
    return net


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M as a checkpoint, by the project's own stage."""
    from pipeline.__main__ import main

    assert main(["smollm2", "--config", "configs/smollm2/smollm2.toml", "--runs", str(folder)]) == 0
    return folder / "smollm2/smollm2/model"


def prompt(*token_ids: int) -> Prompt:
    return Prompt(Problem(id="p", kind="general", question=""), "raw", token_ids)


def random_prompts(vocab: int, lengths=(3, 40, 1, 15, 7, 7, 2, 33)) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [prompt(*torch.randint(3, vocab, (n,), generator=generator).tolist()) for n in lengths]
