"""Sizes of published models of this architecture, and of one that a laptop trains."""

from model.config import ModelConfig

_YARN = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}

DEEPSEEK_V3 = ModelConfig(max_position_embeddings=163840, rope_scaling=_YARN)
"""DeepSeek-V3, V3-Base and R1: 671 B parameters, 37 B of them active for a token."""

MOONLIGHT_16B = ModelConfig(
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    n_shared_experts=2,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.446,
    first_k_dense_replace=1,
    q_lora_rank=None,
    num_nextn_predict_layers=0,
    max_position_embeddings=8192,
    rope_theta=50000.0,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_id=163585,
)
"""Moonlight-16B-A3B: a public base of this architecture that fits one node."""

TINY = ModelConfig(
    vocab_size=640,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_nextn_predict_layers=1,
    max_position_embeddings=2048,
)
"""Every mechanism of the architecture at a size that a laptop trains in minutes."""
