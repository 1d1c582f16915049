"""transformers' models in small, and prompts for them."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests import small
from tests.small import POSITIONS, VOCAB


@pytest.fixture(scope="session")
def llama():
    """A dense model."""
    return small.llama()


@pytest.fixture(scope="session")
def deepseek():
    """transformers' own DeepSeek-V3, tiny: the reference, and the source of the native model's weights."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, routed_scaling_factor=2.5,
        max_position_embeddings=POSITIONS, eos_token_id=2, bos_token_id=1, pad_token_id=0,
        tie_word_embeddings=False, initializer_range=0.2, num_nextn_predict_layers=0,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def deepseek_dir(deepseek, tmp_path_factory):
    """A public checkpoint of it, without a tokenizer."""
    path = tmp_path_factory.mktemp("deepseek")
    deepseek.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def prompts():
    """Eight prompts of 1 to 15 ids, lengths in no order, two of them equal."""
    made = small.random_prompts(VOCAB, (3, 9, 1, 15, 7, 7, 2, 12))
    made[5] = made[4]
    return made
