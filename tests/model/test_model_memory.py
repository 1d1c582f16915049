"""Activation checkpointing: the same loss, gradients and counts, with less kept for the backward."""

import torch
from model_shapes import BASE, make


def learn(recompute):
    """Gradients, load, balance loss, and the bytes that autograd keeps."""
    net = make(BASE).train()
    net.recompute, net.balance_alpha = recompute, 0.1
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net.logits(tokens).logsumexp(-1).mean()
        first = kept
    balance = net.pop_balance_loss()
    (loss + balance).backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return gradients, net.router_load(), balance.detach(), net.pop_balance_loss(), first


def test_recomputing_changes_memory_alone():
    plain, again = learn(False), learn(True)
    assert plain[0].keys() == again[0].keys()
    for name, gradient in plain[0].items():
        torch.testing.assert_close(again[0][name], gradient, msg=name)
    assert torch.equal(plain[1], again[1]) and plain[1].sum() > 0
    assert torch.equal(plain[2], again[2]) and plain[2] > 0
    assert again[3] == 0  # the second forward added nothing
    assert again[4] < plain[4] / 3
