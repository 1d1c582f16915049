"""Small models with random weights, prompts and text, for the tests of several packages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model import TINY, ModelConfig
from model.transformer import Transformer
from pipeline.train.policy import save_policy
from rollout.types import Problem, Prompt

CORPUS = [
    "User: 3+4-5=?\nAssistant: <think> 3+4=7\n7-5=2 </think> <answer> 2 </answer>",
    "计算：3+4=？ 先算三加四，再答。你好，世界。",
    "Hello world, what is it? The value is 12.5 (about): a*b = c/d.",
] * 20
"""What the tests' tokenizer is trained on."""

VOCAB, POSITIONS = 97, 64
"""Of the models whose prompts are random ids."""


def llama(**changes: Any) -> LlamaForCausalLM:
    """A dense model whose choices are neither certain nor uniform, seed 0.

    Weights with a deviation of 0.3 would give logits whose fp32 rounding alone is 1e-5, with anyone.
    """
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
        "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def bias_gates(net: Transformer, deviation: float, generator: torch.Generator) -> Transformer:
    """Random gate biases in place, so that a lost one would show."""
    with torch.no_grad():
        for moe in net.moe_layers():
            moe.gate.e_score_correction_bias.normal_(0, deviation, generator=generator)
    return net


def random_policy(folder: Path, tokenizer: PreTrainedTokenizerFast, template: str, **changes: Any) -> Path:
    """A native model with random weights in `folder`, as a stage leaves one: tokenizer, template, card."""
    config = tiny(len(tokenizer), eos_token_id=tokenizer.eos_token_id, **changes)
    save_policy(Transformer(config, seed=0), tokenizer, folder, template, "random")
    return folder


def tiny(vocab_size: int, **changes: Any) -> ModelConfig:
    """The tiny preset's shape at a quarter of its width, two layers."""
    return replace(TINY, vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, **changes)


def prompt(*token_ids: int) -> Prompt:
    """A prompt of these ids."""
    return Prompt(Problem(id="p", kind="general", question=""), "raw", token_ids)


def random_prompts(vocab_size: int, lengths: Sequence[int]) -> list[Prompt]:
    """Prompts of random ids above the special ones, always the same."""
    generator = torch.Generator().manual_seed(1)
    return [prompt(*torch.randint(3, vocab_size, (n,), generator=generator).tolist()) for n in lengths]
