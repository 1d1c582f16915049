"""Counts of DeepSeek-V3 networks, from their `ModelConfig`.

Axes    d width, h heads, e experts of which a token meets k, i inner width of one expert
"""

from model.config import ModelConfig
from model.sizes.shape import Kept, Parameters, Shape


def native_shape(c: ModelConfig) -> Shape:
    """The shape of a `model.Transformer`."""
    d, h, i, rank = c.hidden_size, c.num_attention_heads, c.moe_intermediate_size, c.q_lora_rank
    e, k, shared = c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts
    trunk, ahead, dense = c.num_hidden_layers, c.num_nextn_predict_layers, c.first_k_dense_replace
    queries, values = h * c.qk_head_dim, h * c.v_head_dim
    keys_and_values = h * (c.qk_nope_head_dim + c.v_head_dim)
    attention = d * queries if rank is None else rank * (d + queries)
    attention += d * c.latent_dim + c.kv_lora_rank * keys_and_values + values * d
    norms = 2 * d + (rank or 0) + c.kv_lora_rank
    feed = 3 * d * c.intermediate_size
    # Of a token's experts, and of the others:
    met, resting = e * d + 3 * d * i * (shared + k), 3 * d * i * (e - k)
    products = trunk * attention + dense * feed + (trunk - dense) * met
    module = attention + met + 2 * d * d  # MTP modules have experts, whatever the trunk has
    active = products + trunk * norms + d + c.vocab_size * d * (1 if c.tie_word_embeddings else 2)
    mtp = ahead * (module + resting + norms + 3 * d)
    # Of what a layer keeps, the part of its norms and its attention:
    around = 4 * d + 2 * (rank or 0) + 2 * c.kv_lora_rank + c.qk_rope_head_dim + 4 * queries + values
    of_dense = Kept(around + 4 * c.intermediate_size, 0)
    # A CPU that computes one expert at a time neither keeps their inputs nor what goes into `down_proj`.
    of_experts = Kept(around + 2 * k * i + 4 * shared * i, 2 * e, casts=d, on_gpus=k * (d + i))
    return Shape(
        parameters=Parameters(active + (trunk - dense) * resting + mtp, active, mtp),
        width=d,
        vocab=c.vocab_size,
        products=products,
        mtp_products=ahead * module,
        pair=queries + values,
        windows=(None,) * trunk,
        mtp_modules=ahead,
        kept=(of_dense,) * dense + (of_experts,) * (trunk - dense),
    )
