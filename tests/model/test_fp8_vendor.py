"""What is handed to `scaled_mm` and DeepGEMM, by stand-ins that read it as their sources and docs state.

The stand-in of `scaled_mm` checks what torch's ScaledBlas.cpp checks (`_scaled_block1x128_block128x128` and
`_scaled_block1x128_block1x128` there) and takes the scales from the memory that cuBLASLt would read.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType

from model.kernels.fp8 import blocks, gemm, vendor
from model.kernels.fp8.blocks import Quantized, dequantize, transpose

TILES, BLOCKS = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128


def memory(t, count):
    """`count` numbers from where `t` begins, as a kernel that knows only the pointer reads them."""
    return torch.as_strided(t, (count,), (1,))


def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, output_dtype, use_fast_accum):
    (m, c), n = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn and not use_fast_accum
    assert a.is_contiguous() and b.T.is_contiguous()  # row-major times column-major
    assert c % 128 == 0 and n % 16 == 0 and m % 4 == 0
    assert recipe_a == TILES and scale_a.dtype == scale_b.dtype == torch.float
    length = c // 128
    assert scale_a.shape == (m, length) and scale_a.stride(0) == 1
    assert scale_a.stride(1) == m or (length == 1 and scale_a.stride(1) == 1)
    left = memory(scale_a, m * length).view(length, m).T  # m c/128
    if recipe_b == TILES:
        assert scale_b.shape == (n, length) and scale_b.stride(0) == 1
        assert scale_b.stride(1) == n or (length == 1 and scale_b.stride(1) == 1)
        right = memory(scale_b, n * length).view(length, n).T
    else:
        assert n % 128 == 0
        four = -(-length // 4) * 4
        assert scale_b.shape == (four, -(-n // 128)) and scale_b.stride(0) == 1
        assert scale_b.stride(1) == four or (scale_b.shape[1] == 1 and scale_b.stride(1) == 1)
        right = memory(scale_b, scale_b.numel()).view(-1, four)[:, :length]
    x, y = Quantized(a, left, 1), Quantized(b.T.contiguous(), right, 1 if recipe_b == TILES else 128)
    return (dequantize(x) @ dequantize(y).T).to(output_dtype)


SHAPES = [(64, 256, 512), (37, 130, 200), (1, 576, 128), (300, 24, 1300), (4, 128, 640)]  # t o i


def off(got, want):
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_mm_gets_the_layouts_that_it_reads(shape, monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    t, o, i = shape
    torch.manual_seed(0)
    x, w, dy = torch.randn(t, i), torch.randn(o, i), torch.randn(t, o)
    a, b, d = blocks.to_tiles(x, 1, True), blocks.to_tiles(w, 128), blocks.to_tiles(dy, 1)
    assert off(vendor.scaled_mm(a, b, torch.float), gemm.multiply(a, b, torch.float)) < 1e-6
    want = gemm.multiply(d, transpose(b), torch.float)
    assert off(vendor.scaled_mm(d, transpose(b), torch.float), want) < 1e-6
    over = blocks.to_tiles(dy.T, 1), blocks.to_tiles(dequantize(a).T, 1, True)
    assert off(vendor.scaled_mm(*over, torch.float), gemm.weight_gradient(dy, a, torch.float)) < 1e-6
    # Scales as the GPU's quantization leaves them: rows next to each other.
    gpu = Quantized(a.values, a.scale.T.contiguous().T, 1)
    assert off(vendor.scaled_mm(gpu, b, torch.float), gemm.multiply(a, b, torch.float)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torchs_own_checks_pass_without_a_gpu(shape):
    """The call, sizes and layouts, by the function that torch has for tensors without memory."""
    t, o, i = shape
    a, b, d = (blocks.to_tiles(torch.ones(s), r) for s, r in (((t, i), 1), ((o, i), 128), ((t, o), 1)))
    over = blocks.to_tiles(torch.ones(o, t), 1), blocks.to_tiles(torch.ones(i, t), 1)
    for left, right in ((a, b), (d, transpose(b)), over):
        bare = [
            Quantized(q.values.to("meta"), torch.empty_like(q.scale, device="meta"), q.rows)
            for q in (left, right)
        ]
        y = vendor.scaled_mm(*bare, torch.bfloat16)
        assert y.shape == (left.values.shape[0], right.values.shape[0]) and y.dtype == torch.bfloat16


def test_a_device_without_hopper_is_not_asked():
    assert not vendor.hopper(torch.device("cpu")) and vendor.deep_gemm() is None


def dense(left, right, out):
    (values, scale), (w, w_scale) = left, right
    assert all(part.is_contiguous() for part in (values, scale, w, w_scale, out))
    out.copy_(dequantize(Quantized(values, scale, 1)) @ dequantize(Quantized(w, w_scale, 128)).T)


def by_expert(left, right, out, rows):
    assert rows.dtype == torch.int32 and len(rows) == len(left[0]) == len(out)
    for start in range(0, len(rows), 128):  # an expert's rows begin at multiples of 128
        part = slice(start, start + 128)
        assert len(rows[part]) == 128 and len(rows[part].unique()) == 1
        e = int(rows[start])
        dense((left[0][part], left[1][part]), (right[0][e], right[1][e]), out[part])


def test_deep_gemm_gets_aligned_groups_and_its_rows_are_put_back():
    library = SimpleNamespace(fp8_gemm_nt=dense, m_grouped_fp8_gemm_nt_contiguous=by_expert)
    torch.manual_seed(0)
    counts = [3, 0, 130, 128, 0]
    a = blocks.to_tiles(torch.randn(261, 256), 1, True)
    a = Quantized(a.values, a.scale.T.contiguous().T, 1)
    w = blocks.to_tiles(torch.randn(5, 384, 256), 128)
    assert vendor.fits_deep_gemm(a, w, torch.bfloat16) and not vendor.fits_deep_gemm(a, w, torch.float)
    got = vendor.deep_gemm_grouped(library, a, w, counts)
    assert off(got.float(), gemm.multiply_grouped(a, w, counts, torch.float)) < 3e-3  # bf16's own rounding
    one = Quantized(w.values[0], w.scale[0], 128)
    got = vendor.deep_gemm_multiply(library, a, transpose(transpose(one)))
    assert off(got.float(), gemm.multiply(a, one, torch.float)) < 3e-3
    assert not vendor.fits_deep_gemm(a, blocks.to_tiles(torch.randn(130, 256), 128), torch.bfloat16)
