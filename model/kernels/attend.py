"""Causal attention of packed sequences by the kernel that their device and lengths suit best: no mask.

    softmax(softcap(scale q k^T)) v            within each sequence, over the last `window` tokens

On a GPU in 16 bits `varlen_attn` reads where sequences end; for few long ones a call of SDPA each is faster.
The choice is by lengths on the host, so nothing waits for the GPU. What neither of them computes is done in
blocks of queries (`blockwise`). No path holds scores of s x s.

Axes    s tokens of all sequences, h query heads, g key heads (h is a multiple), d and e sizes of key, value
"""

from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from model.kernels.blockwise import BlockwiseAttention
from model.kernels.packed import Packed, fold, unfold

CPU_BLOCKS = range(128, 1025)
"""Longest sequences for which a CPU computes in blocks; for shorter and longer ones SDPA is faster."""
CUDNN_FROM = 3072
"""Mean length from which cuDNN, a sequence at a time, beats `varlen_attn` on an H100 (docs/LOG.md)."""
ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Of SDPA on a GPU, the fastest first. The plain one, which keeps complete scores, comes last and is not
forbidden: the order holds for all threads, and another one may generate with what only it computes."""
HALF = (torch.bfloat16, torch.float16)
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""How `varlen_attn` takes fewer key heads than query heads; without it (torch 2.11) they are repeated."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of `q` (s h d) to `k` (s g d) over `v` (s g e): (s h e). Shared prefixes are repeated for it.

    Args:
        packed: lengths of the sequences, and their ends on the tensors' device.
        scale: of the scores.
        window: tokens that a token sees, itself included; None = all earlier ones of its sequence.
        softcap: c of c tanh(score / c); None = scores as they are.
    """
    q, k, v = (unfold(x, packed) for x in (q, k, v))
    return fold(_attend(q, k, v, packed, scale, window, softcap), packed)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    longest, d, e = packed.longest, q.shape[-1], v.shape[-1]
    window = None if window is None or window >= longest else window
    gpu, fused = q.device.type == "cuda", softcap is None and e <= d <= 256
    if gpu and fused and q.dtype in HALF:
        few = len(q) >= CUDNN_FROM * len(packed.lengths) and window is None
        if few and torch.cuda.get_device_capability(q.device) >= (9, 0):
            return _each(q, k, v, packed.lengths, scale)
        return _varlen(q, k, v, packed, scale, window)
    if fused and window is None and (gpu or (e == d and longest not in CPU_BLOCKS)):
        return _each(q, k, v, packed.lengths, scale)
    out: Tensor = BlockwiseAttention.apply(q, k, v, packed.lengths, scale, window, softcap)
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
    """One kernel for all sequences. It takes heads of one size, a multiple of 8."""
    size = -q.shape[-1] % 8 + q.shape[-1]
    x = [F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in (q, k, v)]
    a, b, c = x if GROUPED else [x[0], *_repeated(q, *x[1:])]
    longest, behind = packed.longest, -1 if window is None else window - 1
    out: Any = varlen_attn(
        a, b, c, packed.ends, packed.ends, longest, longest, scale=scale, window_size=(behind, 0), **GROUPED
    )
    return out[..., : v.shape[-1]]


def _each(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """SDPA for each sequence; in one call if they are of one length."""
    gpu, size = q.device.type == "cuda", v.shape[-1]
    if gpu:
        k, v = _repeated(q, k, F.pad(v, (0, q.shape[-1] - size)))
    if len(set(lengths)) == 1:
        rows = [[x.unflatten(0, (len(lengths), -1)) for x in (q, k, v)]]
    else:
        rows = [[x[None] for x in part] for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)]
    with sdpa_kernel(ORDER, set_priority=True) if gpu else nullcontext():
        out = [
            F.scaled_dot_product_attention(
                a, b, c, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
            )
            for a, b, c in ([x.transpose(1, 2) for x in row] for row in rows)  # n L h d -> n h L d
        ]
    parts = [o.transpose(1, 2).flatten(0, 1)[..., :size] for o in out]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _repeated(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Keys and values (s g d) with as many heads as the queries."""
    h = q.shape[1]
    return [x.repeat_interleave(h // x.shape[1], 1) if x.shape[1] < h else x for x in tensors]
