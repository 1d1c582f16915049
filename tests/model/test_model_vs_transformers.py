"""Same weights, same tokens: logits and gradients against transformers' DeepseekV3ForCausalLM, fp32."""

import pytest
import torch
import torch.nn.functional as F
from model_shapes import SHAPES, make

import model
from model.checkpoint import _public

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
    with pytest.warns(UserWarning, match="num_nextn_predict_layers"):  # transformers drops the MTP modules
        back = model.load(tmp_path / "again")
    saved = dict(_public(net))
    for name, tensor in _public(back):
        assert torch.equal(tensor, saved[name]), name
    assert back.config == model.ModelConfig.from_dict(net.config.to_dict() | {"num_nextn_predict_layers": 0})
