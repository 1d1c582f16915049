"""Packed rows: a sequence's states do not depend on what shares its row. And the MTP modules' view."""

import pytest
import torch
from model_shapes import BASE, SHAPES, make

from model.dense import DensePolicy
from model.kernels.packed import Packed
from tests.small import VOCAB, llama


def check_packed(policy, vocab):
    sequences = [torch.randint(vocab, (n,)) for n in (7, 1, 12)]
    packed = policy.hidden(torch.cat(sequences)[None], Packed.of([7, 1, 12]))
    packed.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
    start = 0
    for sequence in sequences:
        alone = policy.hidden(sequence[None])[0]
        torch.testing.assert_close(packed[0, start : start + len(sequence)], alone, atol=1e-5, rtol=1e-5)
        start += len(sequence)


def test_packed_has_each_sequence_once():
    packed = Packed.of([3, 1, 2])
    assert packed.positions.tolist() == [[0, 1, 2, 0, 0, 1]] and packed.index.tolist() == [0, 0, 0, 1, 2, 2]
    assert packed.ends.tolist() == [0, 3, 4, 6] and packed.ends.dtype == torch.int32
    assert packed.lengths == (3, 1, 2) and packed.longest == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_rows_equal_separate_rows(shape):
    check_packed(make(SHAPES[shape]), 97)


def test_packed_rows_equal_separate_rows_in_a_dense_model():
    policy = DensePolicy(llama())
    check_packed(policy, VOCAB)
    tokens = torch.randint(VOCAB, (2, 9))
    torch.testing.assert_close(policy.logits(tokens), policy.network(tokens).logits)


def test_mtp_state_k_knows_the_next_k_tokens_and_no_later_one():
    net = make(SHAPES["groups"])  # two modules
    tokens = torch.randint(97, (1, 20))
    trunk, states = net.hidden_and_mtp(tokens)
    assert trunk.shape == (1, 20, 48) and [s.shape for s in states] == [(1, 20, 48)] * 2
    torch.testing.assert_close(trunk, net.hidden(tokens))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    changed_trunk, changed_states = net.hidden_and_mtp(changed)
    pairs = zip([trunk, *states], [changed_trunk, *changed_states], strict=True)
    for k, (before, after) in enumerate(pairs):
        same = (before - after).abs().amax(-1)[0] < 1e-5
        # The last k states read around the end of the row, which the caller masks.
        assert same[: 12 - k].all() and not same[12 - k : 20 - k].any()


def test_mtp_equals_transformers():
    """transformers' MtpLayer with our weights, fed as its MtpModel feeds it."""
    pytest.importorskip("transformers")
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as peer

    net = make(BASE)
    ours = net.mtp[0]
    config = peer.DeepseekV3Config(**BASE.to_dict(), attn_implementation="eager")
    layer = MtpLayer(config, peer.DeepseekV3DecoderLayer, peer.DeepseekV3RMSNorm, BASE.num_hidden_layers)
    names = {"shared_head.norm.weight": "post_norm.weight"}
    own = ("enorm.", "hnorm.", "eh_proj.", "shared_head.")
    weights = {
        names.get(n, n if n.startswith(own) else f"mtp_block.{n}"): t for n, t in ours.state_dict().items()
    }
    layer.load_state_dict(weights)
    tokens = torch.randint(97, (2, 9))
    trunk, (state,) = net.hidden_and_mtp(tokens)
    positions = torch.arange(8)[None]
    rotary = peer.DeepseekV3RotaryEmbedding(config)(trunk, positions)
    causal = torch.full((1, 1, 8, 8), float("-inf")).triu(1)
    theirs = layer(net.embed_tokens(tokens[:, 1:]), trunk[:, :-1], rotary, causal, positions, None)
    torch.testing.assert_close(state[:, :-1], theirs, atol=1e-5, rtol=1e-5)
