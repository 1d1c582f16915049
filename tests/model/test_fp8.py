"""FP8 linear layers and experts: against the report's arithmetic in float64, against fp32, and when things go
wrong. The Triton kernels: test_fp8_kernels.py.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_shapes import BASE, make
from safetensors.torch import load_file
from torch import nn

import model
from model.kernels.fp8 import blocks, gemm
from model.moe import Experts
from model.scale import fp8
from tests.gpu.checks.compare import relative
from tests.reference import fp8 as reference

SHAPES = [(256, 256, 256), (100, 72, 200), (37, 130, 129), (300, 24, 576), (8, 512, 40)]  # t o i
BOUND = 0.04
"""Largest relative error of a product; that of E4M3 itself is 3.7 %."""


def inputs(t, o, i):
    """Activations, weight and gradient of the sizes that they have in training."""
    generator = torch.Generator().manual_seed(t)
    x, w, dy = (torch.randn(*shape, generator=generator) for shape in ((t, i), (o, i), (t, o)))
    return x, 0.02 * w, 1e-6 * dy


def products(x, w, dy, layer=fp8.Fp8Linear):
    """y, dx and dw of a linear layer made of `layer`."""
    linear = nn.Linear(*w.shape[::-1], bias=False)
    linear.weight = nn.Parameter(w.clone())
    x = x.clone().requires_grad_()
    y = layer(linear)(x)
    y.backward(dy)
    return y.detach(), x.grad, linear.weight.grad


# ---- the format


def test_every_e4m3_number_is_kept_and_ties_go_to_even():
    grid = torch.tensor(reference.e4m3_numbers(), dtype=torch.float)
    assert len(grid) == 127 and grid.max() == 448
    between = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, -grid, between, -between, between * 1.0001, torch.tensor([448.0])])
    x = torch.cat([x, torch.zeros(-len(x) % 128)]).view(-1, 128)
    x[:, 0] = 448  # every scale is 1
    got = blocks.to_tiles(x, 1).values.double().numpy()
    assert np.array_equal(got, reference.to_e4m3(x.double().numpy()))


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantizing_is_the_reports(rows, power_of_two):
    torch.manual_seed(0)
    x = torch.randn(140, 300) * torch.logspace(-12, 3, 140)[:, None]
    x[5] = 0
    got, want = (
        blocks.to_tiles(x, rows, power_of_two),
        reference.quantize(x.double().numpy(), rows, power_of_two),
    )
    np.testing.assert_allclose(got.scale.double(), want[1], rtol=1e-6)
    # A tie in fp32 need not be one in float64: a few numbers may fall on the other side.
    assert (got.values.double().numpy() != want[0]).mean() < 1e-3
    np.testing.assert_allclose(
        blocks.dequantize(got).double(), reference.dequantize(want), rtol=0.07, atol=1e-12
    )


def test_small_gradients_are_not_flushed():
    x = 1e-9 * torch.randn(4, 128)
    assert relative(blocks.dequantize(blocks.to_tiles(x, 1)), x.double()) < 0.03


def test_requantizing_along_the_other_axis_is_free_with_powers_of_two():
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    errors = {}
    for power_of_two in (False, True):
        once = blocks.dequantize(blocks.to_tiles(x, 1, power_of_two))
        twice = blocks.dequantize(blocks.to_tiles(once.T, 1, power_of_two)).T
        errors[power_of_two] = relative(twice, once.double())
    assert errors[True] < 1e-3 < 0.02 < errors[False]


# ---- the products


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_product_is_the_reports_and_within_four_percent(shape):
    x, w, dy = inputs(*shape)
    exact = (x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double())
    want = reference.linear(*(a.double().numpy() for a in (x, w, dy)))
    for name, got, report, true in zip(
        ("Fprop", "Dgrad", "Wgrad"), products(x, w, dy), want, exact, strict=True
    ):
        assert 0.02 < relative(got, true) < BOUND, name
        assert relative(got, torch.from_numpy(report)) < 2e-3, name  # a few ties rounded the other way


def test_emulation_equals_explicit_promotion_every_128():
    x, w, _ = inputs(64, 40, 1000)
    a, b = blocks.to_tiles(x, 1), blocks.to_tiles(w, 128)
    want = reference.multiply(
        *((q.values.double().numpy(), q.scale.double().numpy(), q.rows) for q in (a, b))
    )
    assert relative(gemm.multiply(a, b, torch.float), torch.from_numpy(want)) < 1e-6


@pytest.mark.parametrize("counts", [[3, 0, 250, 47], [0, 0, 0, 300], [128, 1, 128, 43]], ids=str)
def test_grouped_products_within_four_percent(counts):
    torch.manual_seed(0)
    t, o, i = sum(counts), 72, 200
    x, dy = torch.randn(t, i), 1e-6 * torch.randn(t, o)
    w = 0.02 * torch.randn(len(counts), o, i)
    x_in, w_in = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fp8._Product.apply(x_in, w_in, gemm.quantize(w, 128), counts)
    y.backward(dy)
    start, exact = 0, ([], [], [])
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        xe, we, de = x[rows].double(), w[e].double(), dy[rows].double()
        for parts, part in zip(exact, (xe @ we.T, de @ we, de.T @ xe), strict=True):
            parts.append(part)
        if not count:
            assert not w_in.grad[e].any()
            continue
        report = reference.linear(xe.numpy(), we.numpy(), de.numpy())
        got = (y[rows], x_in.grad[rows], w_in.grad[e])
        for g, r in zip(got, report, strict=True):
            assert relative(g, torch.from_numpy(r)) < 3e-3
    for got, parts in zip((y, x_in.grad, w_in.grad), exact, strict=True):
        want = torch.cat(parts) if got.dim() == 2 else torch.stack(parts)
        assert 0.02 < relative(got, want) < BOUND


def test_bias_shape_and_dtype_are_those_of_a_linear_layer():
    linear = nn.Linear(40, 24).to(torch.bfloat16)
    x = torch.randn(2, 3, 40, dtype=torch.bfloat16, requires_grad=True)
    y = fp8.Fp8Linear(linear)(x)
    assert y.shape == (2, 3, 24) and y.dtype == torch.bfloat16
    assert relative(y, linear(x).double()) < BOUND
    y.sum().backward()
    assert x.grad.dtype == linear.weight.grad.dtype == linear.bias.grad.dtype == torch.bfloat16


# ---- outliers and what is not finite


def test_an_outlier_channel_spoils_only_its_own_tile():
    x, w, dy = inputs(256, 128, 512)
    x[:, 300] *= 1000
    exact = (x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double())
    for got, want in zip(products(x, w, dy), exact, strict=True):
        assert relative(got, want) < BOUND
    # What is small beside the outlier is still there, in its own tile too.
    rest = torch.arange(512) != 300
    assert relative(blocks.dequantize(blocks.to_tiles(x, 1))[:, rest], x[:, rest].double()) < 0.03
    # Further out than E4M3 reaches, it costs its own tile and no other; one scale for all would cost all.
    x[:, 300] *= 1e6
    far = (torch.arange(512) < 256) | (torch.arange(512) >= 384)
    assert relative(blocks.dequantize(blocks.to_tiles(x, 1))[:, far], x[:, far].double()) < 0.03
    one_scale = (x / (x.abs().max() / 448)).to(torch.float8_e4m3fn).float() * (x.abs().max() / 448)
    assert relative(one_scale[:, far], x[:, far].double()) > 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("rows", [1, 128])
def test_a_tile_that_holds_what_is_not_finite_is_lost_completely_and_alone(bad, power_of_two, rows):
    x = torch.randn(200, 300)
    x[7, 150] = bad
    finite = blocks.dequantize(blocks.to_tiles(x, rows, power_of_two)).isfinite()
    tile = torch.zeros(200, 300, dtype=torch.bool)
    tile[slice(7, 8) if rows == 1 else slice(0, 128), 128:256] = True
    assert torch.equal(finite, ~tile)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_nan_and_infinity_come_out_of_every_product_that_they_go_into(bad, where):
    x, w, dy = inputs(40, 24, 200)
    {"x": x, "w": w, "dy": dy}[where][3, 4] = bad
    reached = {"x": (0, 2), "w": (0, 1), "dy": (1, 2)}[where]
    for number, got in enumerate(products(x, w, dy)):
        assert got.isfinite().all() == (number not in reached)


# ---- conversion


def test_convert_takes_the_layers_that_the_report_takes_and_shares_their_weights():
    net = make(replace(BASE, q_lora_rank=16))
    names = list(net.state_dict())
    weights = {name: p for name, p in net.named_parameters()}
    assert fp8.convert(net) == len(
        [m for m in net.modules() if isinstance(m, fp8.Fp8Linear | fp8.Fp8Experts)]
    )
    assert list(net.state_dict()) == names
    assert all(weights[name] is p for name, p in net.named_parameters())
    kinds = {name: type(module) for name, module in net.named_modules()}
    assert kinds["lm_head"] is nn.Linear and kinds["mtp.0.eh_proj"] is nn.Linear
    assert kinds["embed_tokens"] is nn.Embedding and kinds["layers.1.mlp.experts"] is fp8.Fp8Experts
    plain = [name for name, kind in kinds.items() if kind is nn.Linear]
    assert plain == ["mtp.0.eh_proj", "lm_head"]
    assert fp8.convert(net) == 0 and not [m for m in net.modules() if type(m) is Experts]


def test_a_converted_network_stays_near_trains_and_decodes():
    net = make(BASE)
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    want = net.logits(tokens).detach()
    fp8.convert(net)
    net.eval()
    got = net.logits(tokens)
    assert 0.005 < relative(got, want.double()) < 0.3  # gates flip where experts are near ties
    with torch.no_grad():
        cache = net.new_cache(2, 32)
        state = net.prefill(tokens.tolist(), cache)
        assert torch.allclose(net.lm_head(state), got[:, -1], atol=1e-4)
        net.decode(tokens[:, :1], cache)
    got.log_softmax(-1)[..., 0].mean().backward()
    # An expert that no token chose has a gradient of zeros; nothing else may be left without.
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in net.named_parameters() if "mtp" not in n
    )


def test_weights_are_quantized_again_exactly_when_they_change():
    layer = fp8.Fp8Linear(nn.Linear(40, 24, bias=False))
    x = torch.randn(5, 40)
    first = layer.kept.of(layer.weight)
    assert layer.kept.of(layer.weight) is first
    other = copy.deepcopy(layer)
    for optimizer in (
        torch.optim.AdamW([layer.weight], lr=1.0, fused=True),
        torch.optim.SGD([layer.weight], 1.0),
    ):
        before = layer(x)
        before.sum().backward()
        optimizer.step()
        assert (layer(x) - before).abs().max() > 0.1
    with torch.no_grad():
        layer.weight.copy_(other.weight)
    assert torch.equal(layer(x), other(x))
    layer.weight.data = 2 * layer.weight.data
    assert torch.allclose(layer(x), 2 * other(x))


# ---- checkpoints


def test_an_fp8_checkpoint_reads_back_as_quantized_and_dequantized(tmp_path):
    net = make(replace(BASE, q_lora_rank=16, intermediate_size=160))
    model.save(net, tmp_path, fp8=True)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    halves = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {f"{name}_scale_inv" for name in halves} == {n for n in tensors if n.endswith("_scale_inv")}
    for name in (
        "0.mlp.down_proj",
        "1.mlp.experts.7.up_proj",
        "2.self_attn.kv_a_proj_with_mqa",
        "3.self_attn.q_b_proj",
    ):
        assert f"model.layers.{name}.weight" in halves
    for name in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"):
        assert tensors[f"{name}.weight"].dtype == torch.float
    assert tensors["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (1, 2)
    want, got = copy.deepcopy(net), model.load(tmp_path)
    fp8.convert(want)
    with torch.no_grad():
        for module in want.modules():
            if isinstance(module, fp8.Fp8Linear):
                module.weight.copy_(blocks.dequantize(blocks.to_tiles(module.weight, 128)))
            elif isinstance(module, fp8.Fp8Experts):  # gate and up are tensors of their own there
                for half in (*module.gate_up_proj.chunk(2, dim=1), module.down_proj):
                    half.copy_(blocks.dequantize(blocks.to_tiles(half, 128)))
    assert all(
        torch.equal(a, b) for a, b in zip(got.state_dict().values(), want.state_dict().values(), strict=True)
    )
    assert any((a != b).any() for a, b in zip(got.parameters(), net.parameters(), strict=True))
