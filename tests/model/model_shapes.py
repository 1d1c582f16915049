"""Small networks for the tests: every switch of the architecture at least once each way."""

from dataclasses import replace

import torch

from model import ModelConfig, Transformer
from tests.small import bias_gates

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}

BASE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    max_position_embeddings=128,
    num_nextn_predict_layers=1,
)

SHAPES = {
    "plain": BASE,
    "q_lora": replace(BASE, q_lora_rank=16, n_shared_experts=2, norm_topk_prob=False, rms_norm_eps=1e-5),
    "groups": replace(BASE, q_lora_rank=16, n_group=4, topk_group=2, num_nextn_predict_layers=2),
    "yarn_tied": replace(BASE, rope_scaling=YARN, tie_word_embeddings=True, rope_theta=1000.0),
    "no_mtp_all_moe": replace(BASE, num_nextn_predict_layers=0, first_k_dense_replace=0, v_head_dim=24),
    "halves": replace(
        BASE, rope_interleave=False, v_head_dim=20, n_group=2, topk_group=1, routed_scaling_factor=1.0
    ),
}


def make(config: ModelConfig, seed: int = 0) -> Transformer:
    """A network with biased gates, and weights large enough that attention is far from uniform."""
    net = Transformer(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return bias_gates(net, 0.3, generator)
