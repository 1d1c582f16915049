"""The 12.3M-parameter network that is timed, and transformers' own DeepSeek-V3 with the same weights.

Given are 12.3M parameters, hidden 256, 6 layers of which 1 dense, 8 heads, 16 experts top-4 in 4 groups of
which 2 count, 1 shared, vocabulary 4096. 12.25M to 12.35M then leave 43 combinations of the usual dims, all
with experts of 128. The peer's decoding times published with those figures do not single one out: its time
for large tensors varies more with the machine's memory than from one combination to the next (docs/LOG.md).
Kept is the smallest attention of all, heads of 32 + 16 and 32: what it costs the peer least to expand.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

import model
from model import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    moe_intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=8,
    n_shared_experts=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_nextn_predict_layers=0,
    max_position_embeddings=1024,
    bos_token_id=None,
    eos_token_id=None,
)
ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "grouped_mm", "batched_mm")


def ours() -> Transformer:
    """The network with weights of seed 0."""
    torch.set_num_threads(1)
    return Transformer(CONFIG, seed=0)


def theirs(net: Transformer, attention: str, experts: str) -> Any:
    """transformers' model with the weights of `net`.

    Args:
        attention: attn_implementation, one of `ATTENTION`.
        experts: experts_implementation, one of `EXPERTS`.
    """
    from transformers import DeepseekV3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save(net, folder)
        peer = DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
        )
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        gap = (peer(tokens).logits - net.logits(tokens)).abs().max()
    assert gap < 1e-4, f"the peer computes something else: {gap:.1e}"
    return peer
