"""The Triton kernels in Triton's interpreter, against the plain code. Run by test_fp8_kernels.py, which sets
TRITON_INTERPRET before anything imports Triton; collected by itself it would compile for a GPU.

A program takes milliseconds here, so the shapes are the smallest with every kind of ragged edge.
"""

import pytest
import torch

from model.kernels import fused
from model.kernels.fp8 import blocks, cuda, gemm
from model.kernels.fp8.blocks import Quantized, dequantize, transpose
from model.kernels.fp8.quantize import square_blocks, tiles
from tests.bench.__main__ import holds
from tests.gpu.checks import fp8_kernels, logprobs
from tests.gpu.fake_cuda import fake_cuda
from tests.gpu.fake_tensor import Cuda

NAN, INF = float("nan"), float("inf")


def bits(q):
    return q.values.view(torch.uint8), q.scale


def same(got, want):
    """Equal values and scales, bit for bit."""
    assert got.rows == want.rows
    assert got.values.shape == want.values.shape and got.scale.shape == want.scale.shape
    assert torch.equal(got.scale, want.scale)
    assert torch.equal(got.values.float(), want.values.float())


def awkward(m, c, dtype=torch.float):
    """Numbers of every size: tiles that are zero, tiny, huge, and one with every tie of E4M3."""
    x = torch.randn(m, c)
    x[0] = 0
    x[1] *= 1e-20
    x[2] *= 1e6
    x[3, : c // 2] = 0
    ties = torch.arange(c) / 16 * 2.0 ** (torch.arange(c) % 9 - 7)
    x[4] = ties
    x[4, 0] = 448  # the scale becomes 1, so the ties stay ties
    x[5] = x[4] / 512
    x[5, 0] = 448
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_tiles_equal_the_plain_code(power_of_two, dtype):
    torch.manual_seed(0)
    x = awkward(37, 200, dtype)
    same(tiles(x, power_of_two), blocks.to_tiles(x, 1, power_of_two))
    same(tiles(x.T, power_of_two), blocks.to_tiles(x.T, 1, power_of_two))  # strides the other way


@pytest.mark.parametrize("shape", [(130, 200), (3, 40, 129), (128, 128)])
def test_blocks_equal_the_plain_code(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    same(square_blocks(x), blocks.to_tiles(x, 128))
    same(square_blocks(x.mT, True), blocks.to_tiles(x.mT, 128, True))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(40, 200)
    x[7, 150] = bad
    for q in (tiles(x), tiles(x, True), square_blocks(x), square_blocks(x, True)):
        back = dequantize(q)
        assert not back[7, 128:].isfinite().any() and back[:, :128].isfinite().all()
    y = cuda.multiply_gpu(tiles(x), square_blocks(torch.randn(20, 200)), torch.float)
    assert not y[7].isfinite().any() and y[:7].isfinite().all()


COUNTS = [5, 0, 70, 130, 0, 1]


def close(got, want):
    """The same numbers, but for the order in which fp32 adds them."""
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_grouped_products_equal_the_plain_code():
    torch.manual_seed(0)
    x, w, dy = torch.randn(206, 150), torch.randn(6, 136, 150), torch.randn(206, 136)
    a, b = blocks.to_tiles(x, 1, True), blocks.to_tiles(w, 128)
    close(cuda.multiply_grouped_gpu(a, b, COUNTS, x.dtype), gemm.multiply_grouped(a, b, COUNTS, x.dtype))
    d, flipped = blocks.to_tiles(dy, 1), transpose(b)
    close(
        cuda.multiply_grouped_gpu(d, flipped, COUNTS, x.dtype),
        gemm.multiply_grouped(d, flipped, COUNTS, x.dtype),
    )
    got = cuda.weight_gradient_grouped_gpu(dy, a, COUNTS, x.dtype)
    close(got, gemm.weight_gradient_grouped(dy, a, COUNTS, x.dtype))
    assert not got[1].any() and not got[4].any()  # experts without tokens


def test_dense_products_equal_the_plain_code():
    torch.manual_seed(0)
    x, w, dy = torch.randn(70, 260), torch.randn(130, 260), torch.randn(70, 130)
    a, b = cuda.quantize_gpu(x, 1, True), cuda.quantize_gpu(w, 128)
    assert isinstance(a, Quantized)
    close(cuda.multiply_gpu(a, b, torch.float), gemm.multiply(a, b, torch.float))
    close(
        cuda.multiply_gpu(cuda.quantize_gpu(dy, 1), transpose(b), torch.float),
        gemm.multiply(blocks.to_tiles(dy, 1), transpose(b), torch.float),
    )
    close(cuda.weight_gradient_gpu(dy, a, torch.float), gemm.weight_gradient(dy, a, torch.float))
    half = cuda.multiply_gpu(a, b, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and (half - gemm.multiply(a, b, torch.float)).abs().max() < 0.5


def test_no_tokens_at_all():
    a = blocks.to_tiles(torch.randn(0, 150), 1, True)
    w = torch.randn(2, 40, 150)
    assert cuda.multiply_grouped_gpu(a, cuda.quantize_gpu(w, 128), [0, 0], torch.float).shape == (0, 40)
    assert not cuda.weight_gradient_grouped_gpu(torch.randn(0, 40), a, [0, 0], torch.float).any()


def test_the_gpu_check_of_the_kernels_holds_in_the_interpreter():
    result = fp8_kernels.run(torch.device("cpu"), [(37, 130, 200)], [[3, 0, 40]], (136, 150))
    missed = [claim for claim in result["claims"] if not holds(claim)]
    assert len(result["claims"]) == 10 and not missed, missed


# ---- log-probabilities

ROUNDING = {torch.float: 2e-5, torch.half: 1e-3, torch.bfloat16: 8e-3}
"""Of a gradient, by its type. The interpreter cuts bf16 off."""


@pytest.mark.parametrize("v", [50, 4096, 9001])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("times", [1.0, 1 / 0.7])
def test_log_probabilities_and_their_gradient_are_those_of_float64(v, dtype, times):
    torch.manual_seed(0)
    z, targets, n = (10 * torch.randn(8, v)).to(dtype), torch.randint(v, (8,)), 8
    targets[:2] = torch.tensor([0, v - 1])
    for row, logit in ((0, 300), (2, 300), (3, -300)):  # certain, and far below what fp32 has a softmax for
        z[row, targets[row]] = logit
    z[4] = 1.0
    beside = torch.full((4, n + 5), 7.0)
    rows = beside[:, 3 : 3 + n]
    fused.log_softmax_rows(z, targets, rows, times, True)
    wide = (z.double() * times).requires_grad_()
    log_p = wide.log_softmax(1)
    want, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(rows[0].double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[1].double(), entropy, rtol=1e-5, atol=5e-6)
    assert (rows[0] <= 0).all() and (beside[:, :3] == 7).all() and (beside[:, 3 + n :] == 7).all()
    d, e = torch.randn(2, n)
    for bonus in (None, e):
        loss = d.double() @ want + (0 if bonus is None else bonus.double() @ entropy)
        (slope,) = torch.autograd.grad(loss, wide, retain_graph=True)
        for out in {dtype, torch.bfloat16}:
            logits = z.clone()
            got = fused.logits_gradient(logits, targets, rows, d, bonus, out, times, 0.5, 0.0)
            assert got.dtype == out and (got.data_ptr() == logits.data_ptr()) == (out == dtype)
            torch.testing.assert_close(got.double(), 0.5 * slope, rtol=ROUNDING[out], atol=3e-6)


def test_logits_that_are_not_finite_spoil_their_own_row():
    z = torch.randn(4, 60)
    z[0, 5], z[1, 3], z[2, 7] = NAN, INF, -INF
    rows, targets = torch.zeros(4, 4), torch.tensor([0, 1, 7, 3])
    fused.log_softmax_rows(z, targets, rows, 1.0, True)
    assert not rows[:2, :2].isfinite().any() and rows[0, 2] == -INF and rows[1, 2:].isfinite().all()
    got = fused.logits_gradient(z, targets, rows, torch.ones(4), torch.ones(4), z.dtype, 1.0, 1.0, 0.0)
    assert got[:2].isnan().all() and got[2:].isfinite().all()


def test_entropies_that_are_not_asked_for_stay_zeros():
    rows = torch.zeros(4, 3)
    fused.log_softmax_rows(torch.randn(3, 60), torch.tensor([0, 1, 7]), rows, 1.0, False)
    assert not rows[1].any() and rows[0].all()


def test_the_gpu_check_of_log_probabilities_holds_in_the_interpreter(monkeypatch):
    """Forward and backward of the head on the fake GPU, by the kernels themselves."""
    kernels = fused.log_softmax_rows, fused.logits_gradient

    def inside(kernel):
        def run(z, *rest):
            out = kernel(z.elem, *(x.elem if isinstance(x, Cuda) else x for x in rest))
            return z if out is z.elem else Cuda(out)

        return run

    with fake_cuda():
        monkeypatch.setattr(fused, "log_softmax_rows", inside(kernels[0]))
        monkeypatch.setattr(fused, "logits_gradient", inside(kernels[1]))
        claims = logprobs.agreement(torch.device("cuda", 0), tokens=20, d=16, v=4_099)
    missed = [claim for claim in claims if not holds(claim)]
    assert len(claims) == 18 and not missed, missed
