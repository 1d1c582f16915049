"""The native and the dense model behind one interface: each promise of `Policy`, for both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_shapes import BASE, make
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from model.dense import DensePolicy
from model.policy import Policy
from model.transformer import Transformer
from tests.small import VOCAB, llama

TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(params=["native", "dense", "dense, tied"])
def policy(request):
    if request.param == "native":
        return make(BASE)
    return DensePolicy(llama(tie_word_embeddings=request.param != "dense"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, name: t.pop(name), "up_proj.weight is missing"),
        (lambda t, name: t.update(other=torch.zeros(3)), "other is not the model's"),
        (
            lambda t, name: t.update({name: t[name][:3].clone()}),
            r"up_proj.weight is \(3, 32\), not \(64, 32\)",
        ),
        (lambda t, name: t.update({name: t[name].to(torch.int8)}), r"up_proj.weight \(I8\) is quantized"),
        (lambda t, name: t.update({name: t[name].to(torch.float8_e4m3fn)}), r"\(F8_E4M3\) is quantized"),
    ],
)
def test_a_dense_checkpoint_whose_tensors_do_not_fit_is_refused(change, says, tmp_path, capfd):
    """transformers would report it at length, and score with random weights in their stead."""
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    capfd.readouterr()
    change(tensors, "model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"do not fit its config.json; the first: .*{says}") as error:
        DensePolicy.load(tmp_path)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_states_head_logits_and_sizes_fit_together(policy):
    assert isinstance(policy, Policy)
    hidden, ahead = policy.hidden_and_mtp(TOKENS)
    assert torch.equal(hidden, policy.hidden(TOKENS))
    assert len(ahead) == (BASE.num_nextn_predict_layers if isinstance(policy, Transformer) else 0)
    assert torch.equal(policy(TOKENS), policy.head(hidden))
    assert policy.logits(TOKENS).shape == (2, 12, policy.config.vocab_size)
    assert policy.config.max_position_embeddings >= 12
    assert policy.num_parameters() == sum(p.numel() for p in policy.parameters())
    assert 0 < policy.num_parameters(active=True) <= policy.num_parameters()


def test_what_a_policy_lacks_is_empty():
    dense = DensePolicy(llama())
    assert dense.after_update(0.1) == {} and dense.pop_balance_loss().item() == 0.0
    net = make(BASE).train()
    net.hidden(TOKENS)
    before = [moe.gate.e_score_correction_bias.clone() for moe in net.moe_layers()]
    metrics = net.after_update(0.01)
    assert metrics["router/max_violation"] > 0 and net.router_load().sum() == 0
    moved = [moe.gate.e_score_correction_bias - b for moe, b in zip(net.moe_layers(), before, strict=True)]
    assert max(step.abs().max().item() for step in moved) == pytest.approx(0.01, abs=1e-6)


def test_public_weights_are_the_saved_ones_and_can_be_written(policy, tmp_path):
    policy.save(tmp_path)
    again = type(policy).load(tmp_path)
    saved, weights = dict(again.public_weights()), dict(policy.public_weights())
    assert saved.keys() == weights.keys() and all(torch.equal(saved[n], t) for n, t in weights.items())
    tied = policy.head.weight is not weights.get("lm_head.weight", policy.head.weight)
    assert ("lm_head.weight" in weights) == (not getattr(policy.config, "tie_word_embeddings", tied))
    before = policy.logits(TOKENS)
    assert torch.equal(again.eval().logits(TOKENS), policy.eval().logits(TOKENS))
    with torch.no_grad():
        for tensor in weights.values():
            tensor.mul_(1.1)
    assert not torch.equal(policy.logits(TOKENS), before)


def test_recompute_changes_no_gradient_and_runs_every_layer_twice(policy):
    """In training. Counted by hooks before a layer's feed-forward; the second forward stops after it."""
    layers = policy.layers if isinstance(policy, Transformer) else policy.network.model.layers
    calls, gradients, counts = [], [], []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy.train()
    for on in (False, True, False):
        policy.recompute = on
        assert policy.recompute is on
        policy.zero_grad()
        calls.clear()
        policy.hidden(TOKENS).square().sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
        counts.append(len(calls))
    assert counts == [len(layers), 2 * len(layers), len(layers)]
    for plain, recomputed in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)
    policy.recompute = True
    calls.clear()
    with torch.no_grad():
        policy.eval().hidden(TOKENS)
    assert len(calls) == len(layers)


def test_recompute_of_an_architecture_without_it_is_refused(monkeypatch):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    monkeypatch.setattr(type(gpt2), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not support gradient checkpointing"):
        DensePolicy(gpt2).recompute = True


@pytest.mark.parametrize("training", [True, False])
def test_a_dense_policy_has_the_mode_of_its_network(training):
    assert DensePolicy(llama().train(training)).training is training


@pytest.mark.parametrize(
    ("module", "absent"), [("model", {"transformers"}), ("rollout.types", {"torch", "transformers", "numpy"})]
)
def test_light_imports_stay_light(module, absent):
    code = f"import sys, {module}; print(*(set(sys.modules) & {absent!r}))"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert not done.stdout.split()
