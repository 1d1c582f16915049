"""Arithmetic of a network: model FLOPs, and what share of a GPU's peak they are (MFU).

Model FLOPs are those of the equations: two for each multiplication, attention over the tokens that a token
sees, a backward twice the forward (PaLM, arXiv:2204.02311, App. B, but there attention counts unseen tokens
too). What an implementation adds, such as a recomputed forward, is not in them.
"""

from collections.abc import Iterable
from typing import Any

from model.config import ModelConfig
from model.sizes.dense import dense_shape
from model.sizes.native import native_shape
from model.sizes.shape import Shape

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}
"""Dense bf16 FLOPs a second by part of the GPU's name, as its maker states them; the first match counts."""


def shape(config: Any) -> Shape:
    """Of a `ModelConfig`, or of a dense model's text config as transformers has it.
    Raises `ValueError`: a dense architecture whose weights are not known here."""
    return native_shape(config) if isinstance(config, ModelConfig) else dense_shape(config)


def flops(
    config: Any,
    lengths: Iterable[int],
    *,
    backward: bool = True,
    scored: int | None = None,
    mtp: bool = False,
) -> float:
    """FLOPs of one pass over sequences of `lengths` tokens; raises as `shape`.

    Args:
        backward: with the backward of all weights.
        scored: tokens that the head turns into logits. None = all.
        mtp: with the multi-token-prediction modules, each with a pass of the head.
    """
    of, lengths = shape(config), list(lengths)
    tokens, modules = sum(lengths), of.mtp_modules if mtp else 0
    headed = (tokens if scored is None else scored) * (1 + modules)
    products = (of.products + (of.mtp_products if mtp else 0)) * tokens + of.width * of.vocab * headed
    windows = of.windows + (None,) * modules
    seen = {window: sum(pairs(n, window) for n in lengths) for window in set(windows)}
    attention = of.pair * sum(seen[window] for window in windows)
    return 2.0 * (products + attention) * (3 if backward else 1)


def pairs(tokens: int, window: int | None = None) -> int:
    """Query-key pairs of a causal sequence, at most `window` keys a query."""
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full


def peak_flops(gpu: str) -> float | None:
    """Peak of the GPU of that name, dense bf16 FLOPs a second; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
