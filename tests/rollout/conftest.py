"""Small models with random weights, and a tokenizer learned from a few lines."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from rollout.tokenizer import train_tokenizer
from rollout.types import Problem, Prompt

CORPUS = [
    "User: 3+4-5=?\nAssistant: <think> 3+4=7\n7-5=2 </think> <answer> 2 </answer>",
    "计算：3+4=？ 先算三加四，再答。你好，世界。",
    "Hello world, what is it? The value is 12.5 (about): a*b = c/d.",
] * 20
VOCAB, POSITIONS = 97, 64


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(CORPUS, vocab_size=400)


@pytest.fixture(scope="session")
def llama():
    """A dense model whose choices are neither certain nor uniform.

    Weights with a deviation of 0.3 give logits whose fp32 rounding alone is 1e-5, transformers' included.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, eos_token_id=2, bos_token_id=1,
        pad_token_id=0, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


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


def prompt(*token_ids: int) -> Prompt:
    return Prompt(Problem(id="p", kind="general", question=""), "raw", token_ids)


@pytest.fixture(scope="session")
def prompts():
    """Eight prompts of 1 to 15 ids, lengths in no order, two of them equal."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 9, 1, 15, 7, 7, 2, 12)
    made = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    made[5] = made[4]
    return [prompt(*ids) for ids in made]
