"""What layers keep for the backward, counted by hooks, against `model.sizes`: CPU and fake GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

from model import ModelConfig
from model.dense import DensePolicy
from model.kernels.packed import Packed
from model.sizes.flops import shape
from model.sizes.memory import training_bytes
from model.transformer import Transformer
from tests.gpu.fake_cuda import fake_cuda

LENGTHS = (64, 200, 120)
FEW, MANY = 1, 3
"""Layers: the difference is that of whole layers, without embedding and last norm."""
COMMON = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 640, "max_position_embeddings": 512}
LLAMA = COMMON | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
DENSE = {
    "Llama": LLAMA,
    "Qwen2": COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "Qwen3": LLAMA,
    "Gemma2": LLAMA,
    "GPT2": {"vocab_size": 64, "n_embd": 256, "n_head": 8},
}
BASE = ModelConfig(
    **COMMON,
    moe_intermediate_size=96,
    num_hidden_layers=MANY,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=0,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_nextn_predict_layers=0,
)
NATIVE = {
    "experts": BASE,
    "more experts, low-rank query": replace(BASE, n_shared_experts=2, num_experts_per_tok=4, q_lora_rank=48),
    "dense layers": replace(BASE, first_k_dense_replace=MANY),
}


def policy(name, layers):
    if name in NATIVE:
        first = min(layers, NATIVE[name].first_k_dense_replace)
        return Transformer(
            replace(NATIVE[name], num_hidden_layers=layers, first_k_dense_replace=first), seed=0
        )
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=layers, **DENSE[name])
    return DensePolicy(transformers.AutoModelForCausalLM.from_config(config))


def kept(name, layers, device, dtype, recompute):
    """Bytes of all storages that autograd keeps in a forward, but for weights; and the config."""
    net = policy(name, layers).to(device, dtype).train()
    net.recompute = recompute
    own = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *net.buffers())}
    sizes, alive = {}, []

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    ids = torch.zeros(1, sum(LENGTHS), dtype=torch.long).to(device)
    with saved_tensors_hooks(note, lambda x: x):
        net.hidden(ids, Packed.of(LENGTHS, device))
    return sum(sizes.values()), net.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "recompute"),
    [*((name, False) for name in (*DENSE, *NATIVE)), ("Llama", True), ("experts", True)],
)
def test_layers_keep_what_the_sizes_say(name, device, dtype, recompute):
    tokens, options = sum(LENGTHS), (device, dtype, recompute)
    with fake_cuda() if device == "cuda" else nullcontext():
        (few, _), (many, config) = (kept(name, layers, *options) for layers in (FEW, MANY))
    a_layer = (many - few) / (MANY - FEW)
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    said = training_bytes(config, tokens=tokens, precision=precision, recompute=recompute, device=device)
    if recompute:  # the inputs of all layers, and all of the one whose backward runs
        said["activations"] -= tokens * max(of.bytes(dtype.itemsize, device) for of in shape(config).kept)
    layers = len(shape(config).kept)
    near = 0.2 if dtype == torch.float32 and device == "cuda" else 0.15  # SDPA gets repeated keys and values
    assert a_layer == pytest.approx(said["activations"] / layers, rel=near)
