"""Dense FP8 products by libraries: torch's `scaled_mm` on Hopper, DeepGEMM where it is installed.

`scaled_mm` hands 1 x 128 and 128 x 128 scales to cuBLASLt (12.9 or later), on compute capability 9.0 only.
The expected layouts, of which a wrong one raises no error:

    tiles     a scale (m, c/128) with strides (1, m), on either side
    blocks    as the second factor (L, n/128) with strides (1, L), L = c/128 rounded up to a multiple of 4

Sizes are padded with zeros to what cuBLASLt takes; weights of real models need none of it.

Axes    m and n rows of the factors, c contraction
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from model.kernels.fp8.blocks import BLOCK, Quantized


@cache
def hopper(device: torch.device) -> bool:
    """Whether `scaled_mm` takes these scales on `device`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def deep_gemm() -> ModuleType | None:
    """DeepGEMM, where it is installed with the names used here (2025-07 or later)."""
    if find_spec("deep_gemm") is None:
        return None
    module = import_module("deep_gemm")
    return module if hasattr(module, "fp8_gemm_nt") else None


def contiguous(values: Tensor) -> Tensor:
    """FP8 `values` in row-major order; copied as bytes, which every device can."""
    return values.view(torch.uint8).contiguous().view(values.dtype)


def padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """FP8 `values` (m c) with zeros up to multiples of `rows` and `columns`."""
    down, right = -values.shape[0] % rows, -values.shape[1] % columns
    if not down and not right:
        return contiguous(values)
    return F.pad(values.view(torch.uint8), (0, right, 0, down)).view(values.dtype)  # 0 is 0.0 in E4M3


def scales(q: Quantized, rows: int) -> Tensor:
    """Scales of `q`, whose values have been padded to `rows`, in the layout for `scaled_mm` (see above)."""
    if q.rows == 1:
        if len(q.scale) == rows and q.scale.stride() == (1, rows):
            return q.scale
        return F.pad(q.scale, (0, 0, 0, rows - len(q.scale))).T.contiguous().T
    return F.pad(q.scale, (0, -q.scale.shape[1] % 4)).contiguous().T  # n/128 L -> L n/128


def scaled_mm(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """`a` (m c) in tiles times `b` (n c), tiles or blocks, transposed: (m n)."""
    m, n = a.values.shape[0], b.values.shape[0]
    # Ragged blocks are padded to full ones: torch's checks of their scales round down in places.
    left, right = padded(a.values, 16, BLOCK), padded(b.values, max(16, b.rows), BLOCK)
    tiles = ScalingType.BlockWise1x128
    recipe = tiles if b.rows == 1 else ScalingType.BlockWise128x128
    x, w = scales(a, len(left)), scales(b, len(right))
    y = F.scaled_mm(left, right.T, x, tiles, w, recipe, output_dtype=dtype, use_fast_accum=False)
    return y[:m, :n]


def fits_deep_gemm(a: Quantized, b: Quantized, dtype: torch.dtype) -> bool:
    """Whether DeepGEMM takes this product: weights in full blocks, bf16 out."""
    full = b.rows == BLOCK and not b.values.shape[-1] % BLOCK and not b.values.shape[-2] % BLOCK
    return full and dtype == torch.bfloat16 and a.values.shape[0] > 0


def deep_gemm_multiply(library: ModuleType, a: Quantized, b: Quantized) -> Tensor:
    """`a` (m c) in tiles times `b` (n c) in blocks, transposed: (m n), bf16."""
    out = torch.empty(len(a.values), len(b.values), dtype=torch.bfloat16, device=a.values.device)
    left = (contiguous(a.values), a.scale.contiguous())
    library.fp8_gemm_nt(left, (contiguous(b.values), b.scale.contiguous()), out)
    return out


def deep_gemm_grouped(library: ModuleType, a: Quantized, b: Quantized, counts: list[int]) -> Tensor:
    """Rows of `a` (m c), `counts` (e) an expert, times `b` (e n c): (m n), bf16. Groups are padded to 128."""
    device = a.values.device
    count = torch.tensor(counts, device=device)
    room = (count + BLOCK - 1) // BLOCK * BLOCK
    expert = torch.repeat_interleave(torch.arange(len(counts), device=device), count)  # m
    shift = (room.cumsum(0) - room) - (count.cumsum(0) - count)
    slot = torch.arange(len(expert), device=device) + shift[expert]  # m, row in the padded layout
    total = sum(-(-c // BLOCK) * BLOCK for c in counts)
    values = torch.zeros(total, a.values.shape[1], dtype=torch.uint8, device=device)
    values[slot] = a.values.view(torch.uint8)
    scale = torch.ones(total, a.scale.shape[1], device=device)
    scale[slot] = a.scale
    rows = torch.repeat_interleave(torch.arange(len(counts), device=device, dtype=torch.int32), room)
    out = torch.empty(total, b.values.shape[1], dtype=torch.bfloat16, device=device)
    right = (contiguous(b.values), b.scale.contiguous())
    library.m_grouped_fp8_gemm_nt_contiguous((values.view(a.values.dtype), scale), right, out, rows)
    return out[slot]
