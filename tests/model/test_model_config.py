"""Configs: what is read, what is refused and how, and the sizes that the reports state."""

import pytest
import torch
from model_shapes import BASE, YARN

from model import DEEPSEEK_V3, MOONLIGHT_16B, TINY, ModelConfig, Transformer


@pytest.mark.parametrize("config", [DEEPSEEK_V3, MOONLIGHT_16B, TINY, BASE])
def test_to_dict_and_back(config):
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_both_spellings_of_rope_mean_the_same():
    old = ModelConfig.from_dict({"rope_theta": 50.0, "rope_scaling": YARN})
    new = ModelConfig.from_dict({"rope_parameters": YARN | {"rope_theta": 50.0, "rope_type": "yarn"}})
    assert old == new and old.rope_scaling["factor"] == 4.0
    plain = ModelConfig.from_dict({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert plain.rope_scaling is None and plain.rope_theta == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 4}, "'hiden_size' is not a field.*'hidden_size'"),
        ({"model_type": "llama"}, "model_type='llama' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 contradicts num_attention_heads=3"),
        ({"n_group": 3}, "cannot be split into n_group=3"),
        ({"n_group": 2, "topk_group": 3}, "topk_group=3 is more than the n_group=2"),
        ({"n_group": 4, "num_experts_per_tok": 3}, "num_experts_per_tok=3 is more than the 2 experts"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 is odd"),
        ({"hidden_size": 0}, "hidden_size=0 is not a positive integer"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace=9 is not within"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type .'linear'. is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "lacks 'original_max_position_embeddings'"),
        ({"rope_scaling": YARN | {"betta_fast": 2}}, "unknown 'betta_fast'.*'beta_fast'"),
    ],
)
def test_contradictions_are_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(BASE.to_dict() | change)


def test_sizes_are_those_of_the_reports():
    with torch.device("meta"):
        deepseek, moonlight = Transformer(DEEPSEEK_V3), Transformer(MOONLIGHT_16B)
    trunk = deepseek.num_parameters() - sum(p.numel() for p in deepseek.mtp.parameters())
    assert trunk / 1e9 == pytest.approx(671, abs=0.1)
    assert sum(p.numel() for p in deepseek.mtp.parameters()) / 1e9 == pytest.approx(11.5, abs=0.15)
    assert deepseek.num_parameters(active=True) / 1e9 == pytest.approx(37, abs=0.6)
    assert moonlight.num_parameters() / 1e9 == pytest.approx(16, abs=0.1)


def test_the_seed_decides_the_weights():
    first, second, other = (Transformer(BASE, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["layers.1.mlp.experts.down_proj"].std().item() == pytest.approx(0.02, rel=0.05)
    torch.manual_seed(3)
    third = Transformer(BASE).lm_head.weight
    torch.manual_seed(3)
    assert torch.equal(third, Transformer(BASE).lm_head.weight)
