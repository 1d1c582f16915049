"""Causal attention on packed sequences: which kernel is right, and how fast forward and backward are.

Sequences lie end to end in one row; a token sees those before it in its own sequence. A backend that refuses
a shape is no failure: its figure is 0 and the reason stands under `refused`. Only `varlen` must run on a GPU.

Axes    t tokens of all sequences, h heads, d head size
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from model.kernels import attend as kernel
from model.kernels.packed import Packed
from tests.gpu.checks.compare import at_most, measured, relative, seconds

SUMMARY = "packed causal attention: ours, varlen, SDPA with a mask or a sequence at a time; errors and times"
BOUND = 1e-2
"""bf16 carries 8 bits; each kernel also rounds the probabilities to bf16."""
FASTER = 3.0
"""Least speed of varlen over the fastest mask: a mask costs t^2, 16 sequences need a 32nd of it."""


@dataclass(frozen=True)
class Shape:
    """Heads of queries and of keys and values; sizes of queries and keys, and of values."""

    heads: int
    kv_heads: int
    qk: int
    v: int


GROUPED, MLA = Shape(16, 2, 128, 128), Shape(16, 16, 192, 128)
UNEVEN = (5, 129, 700, 64, 1022)
ROWS = ((1024,) * 16, (8192,) * 2)


@dataclass(frozen=True)
class Row:
    """Sequences of `lengths` end to end: cumulative `ends` from 0, and a t x t `mask`, true where seen."""

    lengths: Sequence[int]
    ends: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Row:
        count = torch.tensor(lengths, device=device)
        ids = torch.arange(len(lengths), device=device).repeat_interleave(count)
        ends = F.pad(count.cumsum(0), (1, 0)).to(torch.int32)
        return cls(lengths, ends, (ids[:, None] == ids).tril_())


Attention = Callable[[Tensor, Tensor, Tensor, Row], Tensor]
"""Queries, keys, values (t h d) of as many heads each: (t h d)."""


def varlen(q: Tensor, k: Tensor, v: Tensor, packed: Row) -> Tensor:
    """One kernel that knows where sequences end. torch 2.10 has `is_causal` in place of the window."""
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    longest = max(packed.lengths)
    out: Any = varlen_attn(q, k, v, packed.ends, packed.ends, longest, longest, **causal)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """SDPA of one row (t h d)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # t h d -> 1 h t d
    return F.scaled_dot_product_attention(q, k, v, **how)[0].transpose(0, 1)


def masked(backend: SDPBackend) -> Attention:
    """One call of SDPA for all sequences, with the mask."""

    def call(q: Tensor, k: Tensor, v: Tensor, packed: Row) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v, attn_mask=packed.mask)

    return call


def looped(backend: SDPBackend) -> Attention:
    """A call of SDPA for each sequence."""

    def call(q: Tensor, k: Tensor, v: Tensor, packed: Row) -> Tensor:
        parts = zip(*(x.split(list(packed.lengths)) for x in (q, k, v)), strict=True)
        with sdpa_kernel(backend):
            return torch.cat([_sdpa(*part, is_causal=True) for part in parts])

    return call


def network(q: Tensor, k: Tensor, v: Tensor, packed: Row) -> Tensor:
    """What the network calls."""
    return kernel.attend(q, k, v, Packed.of(packed.lengths, q.device), 1 / math.sqrt(q.shape[-1]))


BACKENDS: dict[str, Attention] = {
    "ours": network,
    "varlen": varlen,
    "mask, mem-efficient": masked(SDPBackend.EFFICIENT_ATTENTION),
    "mask, math": masked(SDPBackend.MATH),
    "mask, cuDNN": masked(SDPBackend.CUDNN_ATTENTION),
    "loop, flash": looped(SDPBackend.FLASH_ATTENTION),
    "loop, cuDNN": looped(SDPBackend.CUDNN_ATTENTION),
}
FLASH = {"varlen", "loop, flash"}
"""Backends that take one head size only: values are always padded to that of the keys."""


def run(
    device: torch.device,
    shapes: Sequence[Shape] = (GROUPED, MLA),
    uneven: Sequence[int] = UNEVEN,
    rows: Sequence[Sequence[int]] = ROWS,
) -> dict[str, Any]:
    """Claims: errors against float64; times; on a GPU, varlen's speed at the first shape and row."""
    claims: list[dict[str, Any]] = [claim for shape in shapes for claim in ours(device, shape, uneven)]
    refused: dict[str, str] = {}
    times: dict[str, dict[str, float]] = {}
    padded: dict[str, list[str]] = {}
    for shape in shapes:
        found, pads = errors(device, shape, uneven, refused)
        claims += found
        padded[_name(shape)] = sorted(pads)
        for lengths in rows:
            name = f"{_name(shape)}, {len(lengths)} x {lengths[0]}"
            times[name] = timed(device, shape, lengths, name, pads, refused)
            claims += [measured(f"{name}: {key}", ms, "ms") for key, ms in times[name].items()]
    if device.type == "cuda":
        first, of = next(iter(times.items()))
        masks = [ms for key, ms in of.items() if key.startswith("mask") and ms]
        ratio = min(masks) / of["varlen"] if masks and of["varlen"] else 0.0
        claims.append({"claim": f"{first}: varlen over the fastest mask", "value": ratio, "at_least": FASTER})
    return {"refused": refused, "padded": padded, "uneven": list(uneven), "claims": claims}


def ours(device: torch.device, shape: Shape, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Claims of `model.kernels.attend`, as the network calls it: plain, with a window, with a soft cap."""
    packed, layout = Row.of(lengths, device), Packed.of(lengths, device)
    inputs, upstream = _inputs(device, shape, sum(lengths))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scale, claims = 1 / math.sqrt(shape.qk), []
    for name, window, softcap in (("plain", None, None), ("window", 50, None), ("soft cap", None, 2.0)):
        out = kernel.attend(*inputs, layout, scale, window, softcap)
        repeats = inputs[0].shape[1] // inputs[1].shape[1]
        q, k, v = exact[0], *(x.repeat_interleave(repeats, 1) for x in exact[1:])
        want = reference(q, k, v, packed, window, softcap)
        got = (out, *torch.autograd.grad(out, inputs, upstream))
        wanted = (want, *torch.autograd.grad(want, exact, upstream.double()))
        worst = max(relative(a, b) for a, b in zip(got, wanted, strict=True))
        claims.append(at_most(f"{_name(shape)}, uneven: ours, {name}", worst, BOUND))
    return claims


def errors(
    device: torch.device, shape: Shape, lengths: Sequence[int], refused: dict[str, str]
) -> tuple[list[dict[str, Any]], set[str]]:
    """Claims of the largest error of output and gradients, against float64 on the same bf16 inputs.

    With them the backends whose values are padded: those of FLASH, and those that refuse them as they are.
    """
    packed, claims, pads = Row.of(lengths, device), [], set()
    inputs, upstream = _inputs(device, shape, sum(lengths))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = _both(reference, exact, upstream.double(), packed)

    def worst(attend: Attention, pad: bool) -> float:
        got = _both(attend, inputs, upstream, packed, pad)
        return max(relative(a, b) for a, b in zip(got, want, strict=True))

    for key, attend in BACKENDS.items():
        name, error, uniform = f"{_name(shape)}, uneven: {key}", None, shape.v == shape.qk
        if uniform or key not in FLASH:
            error = _attempt(partial(worst, attend, False), name, refused)
        if error is None and not uniform:
            error = _attempt(partial(worst, attend, True), f"{name}, values padded", refused)
            pads |= {key} if error is not None or key in FLASH else set()
        claims.append(measured(f"{name}: refused", 0.0, "") if error is None else at_most(name, error, BOUND))
    return claims, pads


def timed(
    device: torch.device,
    shape: Shape,
    lengths: Sequence[int],
    name: str,
    pads: set[str],
    refused: dict[str, str],
) -> dict[str, float]:
    """Median milliseconds of forward and backward of each backend; 0 where it refuses."""
    packed, times = Row.of(lengths, device), {}
    inputs, upstream = _inputs(device, shape, sum(lengths))
    for key, attend in BACKENDS.items():
        work = partial(_both, attend, inputs, upstream, packed, key in pads)
        rounds, warmup = (3, 1) if key.startswith("mask") else (10, 3)  # a mask takes up to a second
        median = partial(seconds, work, device, rounds, warmup)
        times[key] = 1e3 * (_attempt(median, f"{name}: {key}", refused) or 0.0)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # math keeps t^2 scores a head
    return times


def reference(
    q: Tensor, k: Tensor, v: Tensor, packed: Row, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax attention written out, a sequence at a time."""
    outputs = []
    parts = zip(*(x.split(list(packed.lengths)) for x in (q, k, v)), strict=True)
    for a, b, c in parts:
        scores = torch.einsum("qhd,khd->hqk", a, b) / math.sqrt(a.shape[-1])
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        unseen = torch.ones(len(a), len(a), dtype=torch.bool, device=a.device).triu(1)
        if window is not None:
            unseen |= torch.ones_like(unseen).tril(-window)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), c))
    return torch.cat(outputs)


def _both(
    attend: Attention, inputs: Sequence[Tensor], upstream: Tensor, packed: Row, pad: bool = False
) -> tuple[Tensor, ...]:
    """Output; gradients of queries, keys and values as the network has them, neither repeated nor padded."""
    q, k, v = inputs
    repeats, size = q.shape[1] // k.shape[1], v.shape[-1]
    keys, values = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
    if pad and size < q.shape[-1]:
        values = F.pad(values, (0, q.shape[-1] - size))
    out = attend(q, keys, values, packed)[..., :size]
    return (out, *torch.autograd.grad(out, (q, k, v), upstream))


def _inputs(device: torch.device, shape: Shape, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values (t h d) in bf16 that take gradients, and the output's gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, size: int) -> Tensor:
        return torch.randn(tokens, heads, size, generator=generator, device=device).to(torch.bfloat16)

    sizes = ((shape.heads, shape.qk), (shape.kv_heads, shape.qk), (shape.kv_heads, shape.v))
    return [normal(*size).requires_grad_() for size in sizes], normal(shape.heads, shape.v)


def _attempt(work: Callable[[], float], name: str, refused: dict[str, str]) -> float | None:
    """Result of `work`, or None and the reason in `refused`. SDPA says why in warnings, not in its error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return work()
        except torch.AcceleratorError:  # the CUDA context is lost: nothing after it would run
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            said = dict.fromkeys(str(warning.message) for warning in caught)
            refused[name] = " | ".join([f"{error!r:.300}", *(f"{text:.200}" for text in said)])[:1500]
            return None


def _name(shape: Shape) -> str:
    sizes = f"{shape.qk}" if shape.qk == shape.v else f"{shape.qk}/{shape.v}"
    return f"D {sizes}, {shape.heads} heads on {shape.kv_heads}"
