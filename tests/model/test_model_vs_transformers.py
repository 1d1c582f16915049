"""Same weights, same tokens: logits and gradients against transformers' DeepseekV3ForCausalLM, fp32."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from model_shapes import SHAPES, make

import model
from model.checkpoint import public_tensors

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=SHAPES)
def pair(request, tmp_path):
    """Our network, and transformers' reading of what we saved."""
    net = make(SHAPES[request.param])
    model.save(net, tmp_path)
    peer = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    return net, peer


def test_logits_and_gradients_equal_transformers(pair):
    net, peer = pair
    tokens = torch.randint(net.config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(1))
    ours, theirs = net.logits(tokens), peer(tokens).logits
    assert theirs.std() > 0.1  # else the comparison below would prove little
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    compared = 0
    for name, parameter in peer.named_parameters():
        ours = dict(net.named_parameters())[name.removeprefix("model.")]
        error = (ours.grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"
        compared += 1
    assert compared == len([n for n, _ in net.named_parameters() if not n.startswith("mtp.")])


def test_public_names_survive_transformers_both_ways(pair, tmp_path):
    net, peer = pair
    peer.save_pretrained(tmp_path / "again")
    # transformers drops the MTP modules
    dropped = pytest.warns(UserWarning, match="num_nextn_predict_layers") if len(net.mtp) else nullcontext()
    with dropped:
        back = model.load(tmp_path / "again")
    saved = dict(public_tensors(net.state_dict(keep_vars=True), net.config))
    for name, tensor in public_tensors(back.state_dict(keep_vars=True), back.config):
        assert torch.equal(tensor, saved[name]), name
    assert back.config == model.ModelConfig.from_dict(net.config.to_dict() | {"num_nextn_predict_layers": 0})


@torch.no_grad()
def test_greedy_generation_equals_transformers(pair):
    net, peer = pair
    net.eval()
    prompts = torch.randint(net.config.vocab_size, (4, 7), generator=torch.Generator().manual_seed(3))
    peer.generation_config.eos_token_id = None
    theirs = peer.generate(prompts, max_new_tokens=40, do_sample=False)[:, prompts.shape[1] :]
    cache = net.new_cache(len(prompts), prompts.shape[1] + 40)
    hidden = net.prefill(prompts.tolist(), cache)
    ours = [net.lm_head(hidden).argmax(-1)]
    while len(ours) < 40:
        ours.append(net.lm_head(net.decode(ours[-1][:, None], cache))[:, 0].argmax(-1))
    assert torch.equal(torch.stack(ours, 1), theirs)
