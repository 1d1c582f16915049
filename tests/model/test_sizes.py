"""Sizes computed from configs, against modules, torch's FLOP counter, and pairs counted one by one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from model_shapes import BASE
from torch.utils.flop_counter import FlopCounterMode

from model import DEEPSEEK_V3, MOONLIGHT_16B, TINY, Transformer, moe
from model.sizes.flops import flops, pairs, peak_flops, shape
from model.sizes.memory import training_bytes

SMALL = {
    **{"vocab_size": 331, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"intermediate_size": 176, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 128},
}
EVEN = SMALL | {"head_dim": None}
DENSE = {
    "Llama": SMALL | {"tie_word_embeddings": True},
    "Llama with biases": SMALL | {"attention_bias": True, "mlp_bias": True},
    "Mistral": SMALL | {"sliding_window": 16},
    "Qwen2": EVEN,
    "Qwen2 with a window": EVEN | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "Qwen3": SMALL,
    "Gemma2": SMALL | {"sliding_window": 16},
    "Gemma3Text": SMALL | {"sliding_window": 16},
    "Granite": EVEN | {"attention_bias": True},
    "Cohere": EVEN,
    "Phi": EVEN,
    "GPT2": {"vocab_size": 331, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
}


def dense(name, device="meta"):
    family, values = name.split()[0], dict(DENSE[name])
    if values.get("head_dim", 0) is None:
        del values["head_dim"]
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{family}Config")(**values)
        )


def native(config):
    with torch.device("meta"):
        return Transformer(config)


NATIVE = {
    "tiny": TINY,
    "base": BASE,
    "full-rank query": replace(BASE, q_lora_rank=None, num_nextn_predict_layers=0),
    "dense": replace(BASE, first_k_dense_replace=BASE.num_hidden_layers, num_nextn_predict_layers=2),
    "tied": replace(TINY, tie_word_embeddings=True, first_k_dense_replace=0),
}


@pytest.mark.parametrize("name", NATIVE)
def test_parameters_of_native_networks(name):
    net, of = native(NATIVE[name]), shape(NATIVE[name]).parameters
    mtp = sum(p.numel() for p in net.mtp.parameters())
    trunk = [layer.mlp for layer in net.layers if isinstance(layer.mlp, moe.MoE)]
    routed = sum(p.numel() for mlp in trunk for p in mlp.experts.parameters())
    unmet = 1 - net.config.num_experts_per_tok / net.config.n_routed_experts
    assert (of.total, of.mtp) == (net.num_parameters(), mtp)
    assert of.active == net.num_parameters(active=True) == of.total - mtp - round(routed * unmet)


@pytest.mark.parametrize("name", DENSE)
def test_parameters_of_dense_networks(name):
    net = dense(name)
    assert shape(net.config).parameters == (*2 * [sum(p.numel() for p in net.parameters())], 0)


def test_published_sizes():
    total, active, mtp = shape(DEEPSEEK_V3).parameters
    assert [round(n / 1e9, 2) for n in (total - mtp, mtp, active)] == [671.03, 11.61, 37.55]
    total, active, mtp = shape(MOONLIGHT_16B).parameters
    assert [round(n / 1e9, 2) for n in (total, active, mtp)] == [15.96, 2.91, 0]


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match="'mamba' are not known; known are llama"):
        shape(SimpleNamespace(model_type="mamba"))


def counted(logits):
    """FLOPs of forward and backward by name of the operator."""
    with FlopCounterMode(display=False) as counter:
        logits().sum().backward()
    return {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Phi"])
def test_flops_of_dense_networks(name):
    net, tokens, of = dense(name, "cpu"), 64, shape(dense(name).config)
    net.set_attn_implementation("eager")  # complete s x s matrices, by bmm
    ids = torch.zeros(1, tokens, dtype=torch.long)
    by = counted(lambda: net(ids, use_cache=False).logits)
    attention, rest = by.pop("bmm"), sum(by.values())
    assert rest == pytest.approx(3 * 2 * tokens * (of.products + of.width * of.vocab), rel=0.01)
    assert attention == pytest.approx(3 * 2 * of.pair * len(of.windows) * tokens**2, rel=0.01)
    seen = attention * pairs(tokens) / tokens**2
    assert flops(net.config, [tokens]) == pytest.approx(rest + seen, rel=0.01)
    assert flops(net.config, [tokens], backward=False) == pytest.approx((rest + seen) / 3, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "full-rank query", "tied"])
def test_flops_of_native_networks(name, monkeypatch):
    monkeypatch.setattr(moe, "one_at_a_time", lambda *_: True)  # torch does not count grouped products
    config, tokens = replace(NATIVE[name], num_nextn_predict_layers=0), 64
    by = counted(lambda: Transformer(config, seed=0).logits(torch.zeros(1, tokens, dtype=torch.long)))
    of, products = shape(config), by.pop("mm")
    assert products == pytest.approx(3 * 2 * tokens * (of.products + of.width * of.vocab), rel=0.01)
    complete = 3 * 2 * of.pair * len(of.windows) * tokens**2  # so short a sequence is one block of scores
    assert sum(by.values()) == pytest.approx(complete, rel=0.01)
    seen = complete * pairs(tokens) / tokens**2
    assert flops(config, [tokens]) == pytest.approx(products + seen, rel=0.01)


def test_pairs_are_those_that_a_query_sees():
    for tokens, window in ((1, None), (9, None), (9, 4), (3, 4), (9, 1)):
        seen = [(q, k) for q in range(tokens) for k in range(q + 1) if window is None or q - k < window]
        assert pairs(tokens, window) == len(seen)


def test_flops_add_up_over_sequences_windows_heads_and_modules():
    config = dense("Gemma2").config
    apart = sum(flops(config, [n]) for n in (5, 40, 64))
    assert flops(config, [5, 40, 64]) == pytest.approx(apart, rel=1e-12)
    of = shape(config)
    assert of.windows == (16, None, 16)
    wide = flops(dense("Qwen3").config, [64]) - 6 * 64 * shape(dense("Qwen3").config).products
    assert wide > flops(config, [64]) - 6 * 64 * of.products
    head = 6 * of.width * of.vocab
    assert flops(config, [64]) - flops(config, [64], scored=10) == pytest.approx(54 * head, rel=1e-9)
    ahead = flops(TINY, [64], mtp=True) - flops(TINY, [64])
    of = shape(TINY)
    assert ahead == 6 * (64 * (of.mtp_products + of.width * of.vocab) + of.pair * pairs(64))


def test_bytes_by_hand():
    """Qwen2.5-1.5B: the arithmetic of 20 bytes a parameter, and 86 kB a token of layer inputs."""
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    weights = shape(config).parameters.total
    assert weights == 1_543_714_304
    for precision in ("float32", "bfloat16", "fp8"):
        of = training_bytes(config, tokens=0, precision=precision, reference=True)
        assert of.pop("activations") == 0 and sum(of.values()) == 20 * weights
    of = training_bytes(config, tokens=1, precision="bfloat16", moments="bfloat16", recompute=True)
    assert of["moments"] == 4 * weights and of["reference"] == 0
    assert of["activations"] == 28 * 1536 * 2 + shape(config).kept[0].bytes(2)


def test_peaks_go_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("NVIDIA T4") is None
