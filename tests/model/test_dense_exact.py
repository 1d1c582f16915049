"""Dense policies on packed rows equal transformers' own forward of each sequence alone, in fp32.

The peer is the network as transformers makes it, with its plain ("eager") attention, its own logits and loss.
Weights are random, biases and norms too: none of them could be left out unseen because it is 0 or 1.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model import dense
from model.dense import DensePolicy
from model.kernels.packed import Packed
from pipeline.train.logprobs import token_logprobs

VOCAB = 97
LENGTHS = (1, 13, 40, 2, 7)
"""Of the packed sequences; windows of 5 tokens are shorter than most."""
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
SHAPES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2, layers with a window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "phi": {"attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "phi3": {"sliding_window": 5},
    "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
REFUSED = {
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "its attention has s_aux"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "its attention cannot be exchanged"),
    "stablelm": ({}, "its layers do not pass on where sequences end"),
    "mamba": ({}, "it has layers of type linear_attention"),
    "gemma3_text": ({**GEMMA, "use_bidirectional_attention": True}, "its attention is not causal"),
    "llama": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        r"a row's longest sequence .*dynamic",
    ),
    "phi3": (
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
            },
        },
        r"a row's longest sequence .*longrope",
    ),
}


def network(kind, changes, attention="sdpa"):
    """A model of transformers in evaluation mode; no parameter is 0 or 1 throughout."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition(",")[0], **{**BASE, **changes})
    net = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def pair(shape):
    """A policy in training mode, and its peer with the same weights."""
    net = network(shape, SHAPES[shape])
    peer = copy.deepcopy(net)
    peer.set_attn_implementation("eager")
    return DensePolicy(net).train(), peer


@pytest.fixture(params=SHAPES)
def both(request):
    return pair(request.param)


TOKENS = torch.randint(3, VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def logprobs(policy, packed):
    """Of each token but the first of its sequence, given those before it."""
    later = packed.positions[0].nonzero()[:, 0]
    hidden = policy.hidden(TOKENS, packed)[0, later - 1]
    return token_logprobs(hidden, policy.head, TOKENS[0, later], entropy=False)[0]


def test_log_probabilities_and_loss_and_gradients_are_those_of_transformers(both):
    """Cross-entropy is the mean over tokens: transformers' own loss of a sequence counts for its targets."""
    policy, peer = both
    ours = logprobs(policy, Packed.of(LENGTHS))
    alone = [x for x in TOKENS.split(LENGTHS, 1) if x.shape[1] > 1]
    out = [peer(input_ids=x, labels=x, use_cache=False) for x in alone]
    dense = [o.logits[0, :-1].log_softmax(-1) for o in out]
    want = [z.gather(1, x[0, 1:, None])[:, 0] for z, x in zip(dense, alone, strict=True)]
    torch.testing.assert_close(ours, torch.cat(want), atol=1e-5, rtol=0)

    loss = sum(o.loss * len(w) for o, w in zip(out, want, strict=True)) / len(ours)
    torch.testing.assert_close(-ours.mean(), loss, atol=1e-6, rtol=0)
    loss.backward()
    (-ours.mean()).backward()
    gradients = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    assert gradients
    for name, p in policy.network.named_parameters():
        if name in gradients:
            size = gradients[name].norm().clamp(min=5e-3)  # a key's bias has no gradient but rounding
            assert (p.grad - gradients[name]).norm() < 1e-5 * size, name


def test_logits_of_rows_and_of_the_network_itself_are_those_of_transformers(both):
    """The network keeps its own forward for engines: with its attention replaced it computes the same."""
    policy, peer = both
    rows = TOKENS[:, :60].view(3, 20)
    with torch.no_grad():
        want = peer(input_ids=rows).logits
        for ours in (policy.logits(rows), policy.network(input_ids=rows).logits):
            torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)


def test_recompute_changes_no_gradient(both):
    policy, _ = both
    found = []
    for policy.recompute in (False, True):
        policy.zero_grad()
        logprobs(policy, Packed.of(LENGTHS)).sum().backward()
        found.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_be_exact_is_refused_by_name_before_it_trains(kind):
    changes, reason = REFUSED[kind]
    net = network(kind, changes, "eager")
    policy, implementation = DensePolicy(net), net.config._attn_implementation
    logits = net(input_ids=TOKENS).logits
    for use in (policy.train, lambda: policy.hidden(TOKENS)):
        with pytest.raises(ValueError, match=f"{type(net).__name__} .*: {reason}"):
            use()
    # An engine can go on with it.
    assert net.config._attn_implementation == implementation and not net.training
    assert torch.equal(net(input_ids=TOKENS).logits, logits)


@pytest.mark.parametrize("changed", ["logits_scaling", "final_logit_softcapping", "bias"])
def test_a_head_that_is_not_understood_is_refused(changed):
    """The network's logits are right; what `DensePolicy.head` knows of them no longer is."""
    kind = {"logits_scaling": "granite", "final_logit_softcapping": "gemma2", "bias": "phi"}[changed]
    net = network(kind, SHAPES[kind])
    policy = DensePolicy(net)
    if changed == "bias":
        out, bias = net.get_output_embeddings(), net.get_output_embeddings().bias.detach()
        out.register_forward_hook(lambda _, __, z: z + bias)
    else:
        policy.config = copy.deepcopy(policy.config)
        setattr(policy.config, changed, 1.0)
    with pytest.raises(ValueError, match="its logits differ from its own"):
        policy.train()


def test_what_is_random_in_training_is_refused():
    net = network("llama", {})
    net.model.layers[1].mlp.register_forward_hook(lambda m, _, y: y + m.training * torch.randn_like(y))
    policy = DensePolicy(net)
    with pytest.raises(ValueError, match="its states differ from its own"):
        policy.train()


@pytest.mark.parametrize("shape", ["gpt2", "phi"])
def test_no_dropout_is_left(shape):
    policy, _ = pair(shape)
    assert policy.network.training
    first, second = (policy.hidden(TOKENS, Packed.of(LENGTHS)) for _ in "ab")
    assert torch.equal(first, second)


def test_a_checkpoint_keeps_its_own_settings(tmp_path):
    """Neither the name of our attention nor the dropout that is off here gets into a saved config."""
    net = network("gpt2", SHAPES["gpt2"])
    DensePolicy(net).train().save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa" and again.config.attn_pdrop == 0.1
    assert "r1_packed" not in (tmp_path / "config.json").read_text()


def test_a_softcap_of_scores_counts_in_an_engine_too():
    """transformers' own default attention leaves it out of Gemma 2, without a word."""
    net = network("gemma2", SHAPES["gemma2"])
    assert net.config._attn_implementation == "sdpa"
    peer = copy.deepcopy(net)
    without = peer(input_ids=TOKENS).logits
    peer.set_attn_implementation("eager")
    with_it = peer(input_ids=TOKENS).logits
    assert (without - with_it).abs().max() > 0.1
    got = DensePolicy(net).network(input_ids=TOKENS).logits
    torch.testing.assert_close(got, with_it, atol=1e-5, rtol=1e-5)


def test_a_frozen_copy_of_a_policy_stays_what_it_is():
    policy, _ = pair("llama")
    frozen = policy.frozen()
    packed = Packed.of(LENGTHS)
    before = policy.hidden(TOKENS, packed).detach()
    with torch.no_grad():
        policy.network.lm_head.weight.mul_(2)
        policy.network.model.embed_tokens.weight.mul_(2)
    assert torch.equal(frozen.hidden(TOKENS, packed), before) and not frozen.training
    assert not torch.equal(policy.hidden(TOKENS, packed), before)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "gpt2"])
def test_norms_that_torch_has_a_kernel_for_are_found_and_no_other(kind, monkeypatch):
    config = AutoConfig.for_model(kind, **{**BASE, **SHAPES[kind]})
    net = DensePolicy(AutoModelForCausalLM.from_config(config))
    norms = [m for m in net.modules() if type(m).__name__.endswith("Norm")]
    fused = [m for m in norms if "forward" in vars(m)]
    assert norms and len(fused) == (0 if kind.startswith("g") else len(norms))
    if fused:
        norms[-1].weight.data[:] = 3.0
        copied = [m for m in copy.deepcopy(net).modules() if type(m).__name__.endswith("Norm")][-1]
        norms[-1].weight.data[:] = 1.0
        x = torch.randn(4, copied.weight.numel())
        torch.testing.assert_close(copied(x), 3 * norms[-1](x))  # a copy norms with its own weight
        own = type(norms[-1]).forward
        monkeypatch.setattr(type(norms[-1]), "forward", lambda self, x: own(self, 2 * x))  # another eps
        assert not dense._is_rms_norm(norms[-1])
