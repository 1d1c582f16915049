"""Log-probabilities of target tokens in chunks: the logits of a batch never exist all at once.

Axes    n scored tokens of a micro-batch; d hidden size; v vocabulary
Units   log-probabilities and entropy in nats
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import linear
from model.policy import Head

CHUNK_BYTES = 64 << 20
"""Most bytes of fp32 logits alive at once; their softmax takes the same again."""
CPU_ROWS = 512
"""Most rows of a chunk on a CPU: between its passes a chunk should stay in the cache."""
SMALL = 1e-30
"""Probabilities below this are not read off the softmax: fp32 loses digits from 1e-38 on, all at 1e-45."""


def token_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (n, with gradient), and the entropy there (n, without).

    `hidden` (n d) are final-normed states at the positions before the `targets` (n). Logits are divided by
    the `temperature` of sampling. Entropies that are not asked for are zeros.
    """
    found: tuple[Tensor, Tensor]
    found = _TokenLogprobs.apply(hidden, head.weight, targets, temperature, entropy)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """As `token_logprobs`, chunk by chunk in both directions; the logits' gradient takes the softmax's place.

        z = logits / temperature       p = softmax z       log p_target       dz = d (onehot - p)

    The softmax is one pass over memory; a maximum, a difference, an exponential and a sum are four. What fits
    into CHUNK_BYTES is kept for the backward as p, more is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        keep = any(ctx.needs_input_grad) and len(hidden) <= rows
        rows = min(rows, CPU_ROWS) if hidden.device.type == "cpu" else rows
        chosen = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropies = torch.zeros_like(chosen)
        kept = []
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            z = _scaled_logits(hidden[part], weight, temperature)
            p = z.softmax(1)
            at_target = z.gather(1, targets[part, None]).squeeze(1)
            chosen[part] = _log(p.gather(1, targets[part, None]).squeeze(1), at_target, z)
            if entropy:  # -sum p log p = log sum exp z - sum p z
                entropies[part] = at_target - chosen[part] - torch.linalg.vecdot(p, z)
            if keep:
                kept.append(p)
        ctx.mark_non_differentiable(entropies)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, weight, targets)
            ctx.rows, ctx.temperature, ctx.kept = rows, temperature, kept
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=d.dtype) if ctx.needs_input_grad[1] else None
        kept, ctx.kept = iter(ctx.kept), []  # overwritten below: a second backward computes it again
        for begin in range(0, len(hidden), ctx.rows):
            part = slice(begin, begin + ctx.rows)
            p = next(kept, None)
            if p is None:
                p = _scaled_logits(hidden[part], weight, ctx.temperature).softmax(1)
            scale = (d[part] / ctx.temperature)[:, None]
            gradient = p.mul_(-scale).scatter_add_(1, targets[part, None], scale).to(weight.dtype)
            d_hidden[part] = linear.times_transposed(gradient, weight.T)
            if d_weight is not None:
                if d_weight.dtype == gradient.dtype:
                    d_weight.addmm_(gradient.T, hidden[part])
                else:
                    d_weight += gradient.T @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Logits (n v) in at least fp32, divided by the temperature."""
    logits = linear.times_transposed(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _log(p: Tensor, at_target: Tensor, z: Tensor) -> Tensor:
    """Logarithms of probabilities `p` (n), of logits `at_target` (n) among `z` (n v).

    As precise as their fp32, but for those so small that the softmax has rounded them to 0 or nearly: these
    are computed from the logits.
    """
    log_p, small = p.log(), p < SMALL
    if small.any():
        log_p[small] = at_target[small] - z[small].logsumexp(1)
    return log_p
