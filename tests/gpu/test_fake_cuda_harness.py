"""The fake GPU itself: what it notes, what it refuses, and that values stay those of the CPU."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from tests.gpu.fake_cuda import fake_cuda

EVENTS = {
    "item": (lambda x: x.sum().item(), "syncs"),
    "float": (lambda x: float(x[0]), "syncs"),
    "if": (lambda x: bool(x.any()), "syncs"),
    "tolist": (lambda x: x.tolist(), "syncs"),
    "nonzero": (lambda x: x.nonzero(), "syncs"),
    "mask": (lambda x: x[x > 0], "syncs"),
    "assigned by a mask": (lambda x: x.clone().__setitem__(x > 0, x[:2]), "syncs"),
    "cpu": (lambda x: x.cpu(), "syncs"),
    "to cpu": (lambda x: x.to("cpu"), "syncs"),
    "from numbers": (lambda x: torch.tensor([1, 2], device=x.device), "syncs"),
    "blocking copy": (lambda x: torch.ones(4).to(x.device), "syncs"),
    "list as an index": (lambda x: x[[0, 1]], "syncs"),
    "repeats on the GPU": (lambda x: x.repeat_interleave((x > -9).long()), "syncs"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "syncs"),
    "pageable copy": (lambda x: torch.ones(4).to(x.device, non_blocking=True), "uploads"),
    "a CPU operand": (lambda x: x + torch.ones(4), "mixed"),
    "a CPU generator": (lambda x: x.normal_(generator=torch.Generator()), "mixed"),
    "load without map_location": (lambda x: torch.load(saved(x), weights_only=True), "mixed"),
}
QUIET = {
    "pinned copy": lambda x: torch.ones(4).pin_memory().to(x.device, non_blocking=True),
    "copy into pinned": lambda x: torch.ones(4, pin_memory=True).to(x.device, non_blocking=True),
    "a number": lambda x: x * 2 + torch.tensor(3.0),
    "one number by a mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "factories": lambda x: x.new_zeros(3) + torch.arange(3, device="cuda") + torch.full_like(x[:3], 2),
    "dtype": lambda x: x.to(torch.bfloat16).float().double(),
    "a slice": lambda x: x[1:3],
    "an index": lambda x: x[x.argsort()],
    "causal attention": lambda x: F.scaled_dot_product_attention(*3 * [x.view(1, 2, 2)], is_causal=True),
    "generator": lambda x: x.normal_(generator=torch.Generator("cuda").manual_seed(0)),
}


def saved(x):
    file = io.BytesIO()
    torch.save({"x": x.detach()}, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_counted_at_its_line(name):
    action, kind = EVENTS[name]
    with fake_cuda() as found:
        x = torch.tensor([1.0, 2.0, -1.0, -2.0]).to("cuda")
        found.clear()
        action(x)
    counts = getattr(found, kind)
    assert sum(counts.values()) >= 1, found.report()
    assert all(where.startswith("tests/gpu/test_fake_cuda_harness.py:") for where, _ in counts)
    assert kind == "mixed" or not found.mixed


@pytest.mark.parametrize("name", QUIET)
def test_what_costs_nothing_is_not_counted(name):
    with fake_cuda() as found:
        x = torch.tensor([1.0, 2.0, -1.0, -2.0]).to("cuda")
        found.clear()
        out = QUIET[name](x)
        assert out is None or out.is_cuda
    assert not (found.syncs or found.mixed or found.uploads), found.report()


def test_a_synchronizing_call_raises_where_torch_is_told_so():
    with fake_cuda():
        x = torch.zeros(2, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match=r"synchronizing.*test_fake_cuda_harness"):
            x.sum().item()
        torch.cuda.set_sync_debug_mode("default")
        x.sum().item()


def test_a_graph_replays_on_new_inputs_and_refuses_to_wait():
    with fake_cuda() as found:
        x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (2 * x)[1:] + 1
            total.add_(x)
        x.copy_(torch.full_like(x, 5.0))
        graph.replay()
        assert y.tolist() == [11, 11] and total.tolist() == [6, 6, 6]
        assert not found.captured
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            y.sum().item()
        assert sum(found.captured.values()) == 1


def test_memory_counts_storages_once_and_while_they_live():
    with fake_cuda() as found:
        before = torch.cuda.memory_allocated()
        x = torch.zeros(1000, device="cuda")
        views = [x[i:] for i in range(5)]
        assert torch.cuda.memory_allocated() - before == 4000
        y = x + 1
        assert found.largest[0] == 4000 and "test_fake_cuda_harness" in found.largest[1]
        del x, views, y
        assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() == before + 8000
        free, total = torch.cuda.mem_get_info()
        assert total - free == before


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False))
    net[3].weight = net[0].weight
    return net


def trained(device):
    """Loss, gradient and weights after two updates, one of them after saving and loading."""
    net = small().to(device)
    adamw = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    ids = torch.arange(11).to(device)
    for _ in range(2):
        loss = F.cross_entropy(net(ids), ids)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        adamw.step()
        adamw.zero_grad()
        state = saved_and_loaded({"net": net.state_dict(), "adamw": adamw.state_dict()}, device)
        net.load_state_dict(state["net"])
        adamw.load_state_dict(state["adamw"])
    assert net[3].weight is net[0].weight and all(p.device.type == device for p in net.parameters())
    copied = copy.deepcopy(net)
    assert copied[3].weight is copied[0].weight is not net[0].weight
    return [x.detach().cpu() for x in (loss, norm, *net.parameters())]


def saved_and_loaded(state, device):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location=device, weights_only=True)


def test_training_saving_and_ties_are_those_of_the_cpu():
    want = trained("cpu")
    with fake_cuda() as found:
        got = [x.clone() for x in trained("cuda")]
    assert not found.mixed, found.report()
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("heads", "window"), [((4, 4), (-1, 0)), ((4, 2), (-1, 0)), ((2, 2), (3, 0))])
def test_varlen_attention_is_causal_attention_a_sequence_at_a_time(heads, window):
    torch.manual_seed(0)
    lengths = [1, 7, 12]
    shapes = [(20, heads[0], 16), (20, heads[1], 16), (20, heads[1], 16), (20, heads[0], 16)]
    *inputs, upstream = (torch.randn(shape) for shape in shapes)

    def plain(q, k, v):
        parts = []
        for a, b, c in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True):
            n = a.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool).tril().triu(-window[0] if window[0] >= 0 else -n)
            parts.append(F.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True))
        return torch.cat(parts, 1).transpose(0, 1)

    exact = [x.bfloat16().float().requires_grad_() for x in inputs]
    want = plain(*exact)
    wanted = torch.autograd.grad(want, exact, upstream)
    with fake_cuda() as found:
        ends = torch.tensor([0, 1, 8, 20], dtype=torch.int32).to("cuda")
        ours = [x.to("cuda", torch.bfloat16).requires_grad_() for x in inputs]
        out = varlen_attn(*ours, ends, ends, 12, 12, window_size=window, enable_gqa=heads[0] != heads[1])
        out.backward(upstream.to(out))
        got = [out.detach().float().cpu(), *(x.grad.float().cpu() for x in ours)]
        with pytest.raises(RuntimeError, match="fp16 and bf16"):
            varlen_attn(*(x.float() for x in ours), ends, ends, 12, 12, enable_gqa=True)
    assert not found.mixed
    for a, b in zip(got, (want, *wanted), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_torch_is_as_before_afterwards():
    with fake_cuda():
        pass
    assert not torch.cuda.is_available() and torch.version.cuda is None
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
