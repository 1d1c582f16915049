"""The gate, the bias that balances it, and the loss that does, each against the equations in loops."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_shapes import BASE, make

from model.kernels.packed import Packed
from model.moe import Gate
from tests.reference.gate import balance_loss_one_sequence, gate_one_token


@pytest.mark.parametrize(("groups", "topk_group", "normalize"), [(1, 1, True), (4, 2, True), (2, 1, False)])
@pytest.mark.parametrize("shift", [0.0, -2.0])  # -2: every biased score is negative
def test_gate_is_the_equations(groups, topk_group, normalize, shift):
    config = replace(
        BASE, n_group=groups, topk_group=topk_group, norm_topk_prob=normalize, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    gate = Gate(config)
    gate.weight.data.normal_()
    gate.e_score_correction_bias.normal_().mul_(0.3).add_(shift)
    u = torch.randn(64, config.hidden_size) * 0.3
    ids, g, _ = gate(u)
    for t in range(len(u)):
        want = gate_one_token(
            u[t].double().tolist(),
            gate.weight.double().tolist(),
            gate.e_score_correction_bias.double().tolist(),
            k=2,
            groups=groups,
            topk_group=topk_group,
            scale=config.routed_scaling_factor,
            normalize=normalize,
        )
        assert dict(zip(ids[t].tolist(), g[t].tolist(), strict=True)) == pytest.approx(want, rel=1e-5)


def violation(load):
    """Max violation of balance (arXiv:2408.15664, Eq. 4): the fullest expert's surplus over the mean."""
    return (load.max() / load.float().mean() - 1).item()


def test_bias_updates_even_out_a_skewed_gate():
    torch.manual_seed(0)
    gate = Gate(BASE)
    gate.weight.data.normal_(0, 0.05)
    skew = torch.randn(BASE.hidden_size)  # what all tokens share pulls them to the same experts
    u = torch.randn(512, BASE.hidden_size) + 2 * skew
    worst = []
    for _ in range(150):
        gate.count(gate(u)[0])
        worst.append(violation(gate.load))
        gate.update_bias(0.01)
        assert gate.load.sum() == 0
    assert worst[0] > 1 and worst[-1] < 0.2


def test_load_is_counted_in_training_only():
    net = make(BASE)
    tokens = torch.randint(97, (2, 10))
    net.hidden(tokens[:1], Packed.of([6, 4]))
    assert net.router_load().sum(1).tolist() == [10 * 3] * 2 + [0]  # the MTP module has not run
    net.hidden_and_mtp(tokens)
    assert net.router_load().sum(1).tolist() == [30 * 3] * 2 + [2 * 10 * 3]
    before, biases = net.router_load(), [m.gate.e_score_correction_bias.clone() for m in net.moe_layers()]
    with torch.no_grad():
        net.hidden(tokens)
    net.eval()
    net.hidden(tokens)
    net.prefill(tokens.tolist(), net.new_cache(2, 10))
    assert torch.equal(net.router_load(), before)
    net.update_router_bias(0.0)
    assert net.router_load().sum() == 0
    assert all(
        torch.equal(b, m.gate.e_score_correction_bias) for b, m in zip(biases, net.moe_layers(), strict=True)
    )


def test_balance_loss_is_eq_17_over_sequences_whatever_their_packing():
    net = make(BASE)
    net.balance_alpha = 0.5
    lengths = [9, 4, 6]
    sequences = [torch.randint(97, (n,)) for n in lengths]
    affinities = []
    for moe in net.moe_layers()[:2]:
        moe.gate.register_forward_hook(lambda gate, args, out: affinities.append(out[2].detach().double()))
    net.hidden(torch.cat(sequences)[None], Packed.of(lengths))
    packed = net.pop_balance_loss()
    want = 0.0
    for s in affinities:
        for part in s.split(lengths):
            want += 0.5 * balance_loss_one_sequence(part.tolist(), k=3) / 3
    assert packed.item() == pytest.approx(want, rel=1e-5)
    packed.backward()
    assert net.layers[1].mlp.gate.weight.grad.abs().sum() > 0
    for sequence in sequences:
        net.hidden(sequence[None])
    assert net.pop_balance_loss().item() / 3 == pytest.approx(packed.item(), rel=1e-4)
    assert net.pop_balance_loss().item() == 0.0


def test_the_bias_stays_fp32_when_the_network_is_cast():
    net = make(BASE)
    bias = net.layers[1].mlp.gate.e_score_correction_bias.clone()
    net.to(torch.bfloat16)
    assert torch.equal(net.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert net.logits(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.bfloat16
    cache = net.new_cache(1, 8)
    net.prefill([[0, 0, 0, 0]], cache)
    assert net.decode(torch.tensor([[1]]), cache).dtype == torch.bfloat16


RANK = """
import sys, torch, torch.distributed as dist
from dataclasses import replace
from model.moe import Gate
from model import TINY
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
gate = Gate(TINY)
gate.count(torch.tensor([[0, 1], [0, 2], [0, 3]]) if rank == 0 else torch.tensor([[4, 5], [6, 7], [5, 1]]))
gate.update_bias(0.1)
print(gate.e_score_correction_bias.tolist(), int(gate.load.sum()))
dist.destroy_process_group()
"""


def test_ranks_step_the_bias_by_the_load_of_all(tmp_path):
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")],
            cwd=root, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=120)[0].split("]") for process in ranks]
    biases = [[float(x) for x in words[0].strip("[").split(",")] for words in printed]
    # Loads of both: 3 2 1 1 1 2 1 1, mean 1.5.
    assert biases[0] == biases[1] == pytest.approx([-0.1, -0.1, 0.1, 0.1, 0.1, -0.1, 0.1, 0.1])
    assert all(int(words[1]) == 0 for words in printed)  # set to 0
