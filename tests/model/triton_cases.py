"""The Triton kernels in Triton's interpreter, against the plain code. Run by test_fp8_kernels.py, which sets
TRITON_INTERPRET before anything imports Triton; collected by itself it would compile for a GPU.

A program takes milliseconds here, so the shapes are the smallest with every kind of ragged edge.
"""

import pytest
import torch

from model.kernels.fp8 import blocks, cuda, gemm
from model.kernels.fp8.blocks import Quantized, dequantize, transpose
from model.kernels.fp8.quantize import square_blocks, tiles
from tests.bench.__main__ import holds
from tests.gpu.checks import fp8_kernels

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
