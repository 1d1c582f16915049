"""Triton: log-probabilities of logits (n v) in one pass over a GPU's memory, and their gradient in a second.

In fp32, by the equations of `pipeline.train.logprobs`. Where rows begin in their tensor is not compiled in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rounded as written: with a product fused into the difference, the largest logit is not 0 away from itself.
HOW = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["rows_of"], do_not_specialize_on_alignment=["targets", "rows"])
def _log_softmax(z, targets, rows, v, z_n, rows_of, times, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    z, rows = z + n * z_n, rows + n
    most, total, product = -3.0e38, tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, v, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(z + at, mask=at < v, other=float("-inf")).to(tl.float32) * times
        before, most = most, tl.maximum(most, tl.max(x, axis=0))
        shift, x = before - most, x - most
        shrink, power = tl.exp(shift), tl.exp(x)
        if ENTROPY:  # 0 log 0 = 0
            product = (product + shift * total) * shrink + tl.where(power == 0, 0.0, power * x)
        total = total * shrink + power
    sum = tl.sum(total, axis=0)
    tl.store(rows, tl.load(z + tl.load(targets + n)).to(tl.float32) * times - most - tl.log(sum))
    if ENTROPY:
        tl.store(rows + rows_of, tl.log(sum) - tl.sum(product, axis=0) / sum)
    tl.store(rows + 2 * rows_of, most)
    tl.store(rows + 3 * rows_of, tl.log(sum))


@triton.jit(do_not_specialize=["rows_of"], do_not_specialize_on_alignment=["targets", "rows", "d", "e"])
def _logits_gradient(
    z, out, targets, rows, d, e, v, z_n, rows_of, times, rate, uncap,
    ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = rows + n
    z = tl.load(z + n * z_n + at, mask=at < v, other=0.0).to(tl.float32) * times
    log_p = z - tl.load(rows + 2 * rows_of) - tl.load(rows + 3 * rows_of)
    p = tl.exp(log_p)
    dz = tl.load(d + n) * (tl.where(at == tl.load(targets + n), 1.0, 0.0) - p)
    if ENTROPY:
        dz -= tl.load(e + n) * tl.where(p == 0, 0.0, p * (log_p + tl.load(rows + rows_of)))
    if SOFTCAP:
        dz *= 1 - (z * uncap) * (z * uncap)
    tl.store(out + n * z_n + at, (dz * rate).to(out.dtype.element_ty), mask=at < v)


def log_softmax_rows(z: Tensor, targets: Tensor, rows: Tensor, times: float, entropy: bool) -> Tensor:
    """Fill `rows` (4 n, fp32) from the logits `times` `z` (n v): log-probability of the `targets` (n),
    entropy where asked for, largest logit, and logarithm of the sum of exponentials above it. Return `z`."""
    sizes = (z.shape[1], z.stride(0), rows.stride(0))
    _log_softmax[(len(z),)](z, targets, rows, *sizes, times, ENTROPY=entropy, **HOW)
    return z


def logits_gradient(
    z: Tensor, targets: Tensor, rows: Tensor, d: Tensor, e: Tensor | None, dtype: torch.dtype, *how: float
) -> Tensor:
    """dy in `dtype`, over `z` if that is its own, from what `log_softmax_rows` took and filled. `how`:
    `times`, dz/dy, and what takes a logit to the hyperbolic tangent of a soft cap (0: there is none)."""
    out = z if z.dtype == dtype else torch.empty_like(z, dtype=dtype)
    given = (z, out, targets, rows, d, d if e is None else e, z.shape[1], z.stride(0), rows.stride(0), *how)
    grid = (len(z), triton.cdiv(z.shape[1], HOW["BLOCK"]))
    _logits_gradient[grid](*given, ENTROPY=e is not None, SOFTCAP=how[-1] != 0, **HOW)
    return out
