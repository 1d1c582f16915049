"""Routed experts: grouped, filled up and recombined, against a loop over tokens; RMSNorm against torch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_shapes import BASE

from model import Transformer, layers, load, moe, save
from model.kernels.cpu import experts as cpu_experts
from model.kernels.cpu.experts import all_at_once
from model.layers import RMSNorm
from model.moe import Experts, Plan, WeightedSwiGLU
from pipeline.train.precision import Masters

T, K = 40, 3


def made(dtype=torch.float64):
    torch.manual_seed(0)
    experts = Experts(BASE).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    u = torch.randn(T, BASE.hidden_size, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(BASE.n_routed_experts - 1)[:K] for _ in range(T)])  # the last gets none
    g = torch.rand(T, K, dtype=dtype, requires_grad=True)
    return experts, u, ids, g


def one_by_one(experts, u, ids, g):
    out = []
    for t in range(T):
        y = torch.zeros_like(u[t])
        for i, gate_value in zip(ids[t], g[t], strict=True):
            gate, up = (experts.gate_up_proj[i] @ u[t]).chunk(2)
            y = y + gate_value * (experts.down_proj[i] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("turns", [False, True], ids=["all at once", "one at a time"])
@pytest.mark.parametrize("align", [1, 64])
def test_experts_equal_a_loop_over_tokens(align, turns, monkeypatch):
    monkeypatch.setattr(moe, "one_at_a_time", lambda u, pairs, experts: turns)
    monkeypatch.setattr(moe, "alignment", lambda u: align)
    experts, u, ids, g = made()
    ours, want = experts(u, ids, g), one_by_one(experts, u, ids, g)
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=1e-12)
    leaves = [u, g, *experts.parameters()]
    upstream = torch.randn_like(want)
    gradients = (torch.autograd.grad(y, leaves, upstream) for y in (ours, want))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_experts_run_one_at_a_time_where_each_has_work():
    assert moe.one_at_a_time(torch.zeros(1), 32 * 5, 5)
    assert not moe.one_at_a_time(torch.zeros(1), 32 * 5 - 1, 5)
    assert not moe.one_at_a_time(torch.zeros(1, device="meta"), 10**6, 5)


def test_rows_are_filled_up_on_a_cpu_in_bf16_alone():
    """A GPU would wait for the host to count them."""
    many = torch.zeros(moe.BF16_PAD_FROM, 1, dtype=torch.bfloat16)
    assert moe.alignment(many) == 64
    assert moe.alignment(many[1:]) == moe.alignment(many.float()) == 1
    assert moe.alignment(many.to("meta")) == 1


@pytest.mark.parametrize("turns", [False, True], ids=["all at once", "one at a time"])
def test_bf16_experts_are_near_fp64(turns, monkeypatch):
    monkeypatch.setattr(moe, "one_at_a_time", lambda u, pairs, experts: turns)
    experts, u, ids, g = made()
    want = experts(u, ids, g)
    wide = torch.autograd.grad(want.square().sum(), [u, g, *experts.parameters()])
    u16, g16 = u.detach().bfloat16().requires_grad_(), g.detach().float().requires_grad_()
    experts.bfloat16()
    ours = experts(u16, ids, g16)
    narrow = torch.autograd.grad(ours.double().square().sum(), [u16, g16, *experts.parameters()])
    assert ours.dtype == torch.bfloat16 and (ours - want).norm() < 0.02 * want.norm()
    for mine, theirs in zip(narrow, wide, strict=True):
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_large_bf16_batches_are_filled_up_and_others_are_not():
    assert moe.alignment(torch.zeros(2048, 4, dtype=torch.bfloat16)) == 64
    assert moe.alignment(torch.zeros(32, 4, dtype=torch.bfloat16)) == 1
    assert moe.alignment(torch.zeros(2048, 4)) == 1


@pytest.mark.parametrize("align", [1, 8])
def test_the_plan_sends_every_pair_to_a_row_of_its_expert(align):
    ids = torch.tensor([[0, 3], [3, 1], [3, 0]])
    plan = Plan.of(ids, 5, align)
    assert len(plan.rows) == 5 and not (plan.rows % align).any()
    owner = torch.arange(5).repeat_interleave(plan.rows)
    assert torch.equal(owner[plan.slots], ids)
    assert torch.equal(plan.pair[plan.slots], torch.arange(6).view(3, 2))
    assert torch.equal(plan.token[plan.slots], torch.arange(3)[:, None].expand(3, 2))
    assert (plan.token == 3).sum() == plan.rows.sum() - 6  # padding rows


def test_weighted_swiglu_has_the_gradient_of_its_formula():
    h = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    gate, up = h.chunk(2, -1)
    torch.testing.assert_close(WeightedSwiGLU.apply(h, g), F.silu(gate) * up * g)
    assert torch.autograd.gradcheck(WeightedSwiGLU.apply, (h, g))


@pytest.mark.parametrize("rows", [5, 1000], ids=["in parts", "at once"])
def test_rms_norm_is_that_of_torch_in_every_dtype(rows, monkeypatch):
    monkeypatch.setattr(layers, "PART", rows * 16)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        norm = RMSNorm(16, 1e-5)
        norm.weight.data.normal_(1, 0.3)
        norm.to(dtype)
        x = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
        want = F.rms_norm(x, (16,), norm.weight, 1e-5)
        torch.testing.assert_close(norm(x), want, atol=tolerance, rtol=tolerance)
        upstream = torch.randn_like(want)
        pairs = (torch.autograd.grad(y, (x, norm.weight), upstream) for y in (norm(x), want))
        for mine, theirs in zip(*pairs, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, theirs, atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 8), (16, 6), (7, 8)], ids=["torch's", "odd", "odd too"])
def test_grouped_products_of_any_size_are_those_of_each_expert(inputs, outputs):
    torch.manual_seed(0)
    x, weight = torch.randn(24, inputs), torch.randn(4, inputs, outputs).transpose(1, 2)
    counts, upstream = torch.tensor([8, 0, 11, 5]), torch.randn(24, outputs)
    leaves = x.requires_grad_(), weight.requires_grad_()
    owner = torch.arange(4).repeat_interleave(counts)
    results = []
    for y in (Experts(BASE).grouped(x, weight, counts), torch.einsum("mi,moi->mo", x, weight[owner])):
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_are_the_same_as_sorted_by_expert(dtype, monkeypatch):
    """One expert gets none here."""
    experts, u, ids, g = made()
    experts, u = experts.to(dtype), u.to(dtype)
    with torch.no_grad():
        got = all_at_once(u, ids, g, experts.gate_up_proj, experts.down_proj)
        monkeypatch.setattr(moe, "all_at_once", lambda *_: None)
        want = experts(u, ids, g)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_tokens_go_to_all_experts_where_that_is_little_work_without_gradients(monkeypatch):
    few, u, ids, g = made(torch.float32)
    given = u, ids, g, few.gate_up_proj, few.down_proj
    assert all_at_once(*given) is None, "gradients are needed"
    unchosen = T * (BASE.n_routed_experts - K) * BASE.hidden_size * BASE.moe_intermediate_size
    with torch.no_grad():
        for limit in (unchosen, unchosen - 1):
            monkeypatch.setattr(cpu_experts, "ALL_AT_ONCE", {torch.float32: limit})
            assert (all_at_once(*given) is None) == (limit < unchosen)
        assert all_at_once(u.double(), *given[1:]) is None, "no limit is known for fp64"


def test_weights_of_experts_lie_outputs_side_by_side_wherever_they_come_from(tmp_path):
    """Decoding relies on it for its speed."""
    net = Transformer(BASE, seed=0)
    save(net, tmp_path)
    trained = Transformer(BASE, seed=0)
    Masters(trained, "bfloat16")
    for it in (net, load(tmp_path), load(tmp_path, dtype=torch.bfloat16), copy.deepcopy(net), trained):
        stacked = [p for p in it.parameters() if p.dim() == 3]
        assert stacked and all(p.transpose(1, 2).is_contiguous() for p in stacked)
