"""Log-probabilities of target tokens in chunks: the logits of a batch never exist all at once.

Axes    n scored tokens of a micro-batch; d hidden size; v vocabulary
Units   log-probabilities and entropy in nats
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import linear
from model.policy import Head

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
"""Most bytes of a chunk: on a CPU of its softmax in fp32, beside which its logits are alive; on a GPU of its
logits. A chunk adds to the gradient of the whole head, so that small ones cost a GPU much traffic."""
CPU_ROWS = 512
"""Most rows of a chunk on a CPU: between its passes a chunk should stay in the cache."""


def token_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = True,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (n, with gradient), and the entropy there (n, with one where asked for).

    `hidden` (n d) are final-normed states at the positions before the `targets` (n). The head's logits are
    divided by the `temperature` of sampling. Entropies that are not asked for are zeros."""
    found: tuple[Tensor, Tensor]
    how = (head.scale, head.softcap, temperature, entropy or entropy_gradient, entropy_gradient)
    found = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, *how)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """As `token_logprobs`, chunk by chunk in both directions; the logits' gradient takes the softmax's place.

        y = scale (W h + b)     z = y / temperature, or c tanh(y / c) / temperature     p = softmax z

        log p_target = z_target - max z + log max p       entropy = max z - log max p - sum p z

        dz = d (onehot - p) - e p (log p + entropy)       dy = dz / temperature (1 - tanh(y / c)^2)

    d and e are the gradients of log-probability and entropy; that of an entropy is computed where asked for.

    The softmax is one pass over memory; a logarithm of the sum of exponentials would be four, and the
    logarithm of p_target has no digits below 1e-38. What fits into one chunk of CHUNK_BYTES is kept for the
    backward as p, more is computed again. `fused` keeps z, writes dy over it, and leaves float64 to this."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        entropy: bool,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        wide = torch.promote_types(hidden.dtype, torch.float32)
        fused = import_module("model.kernels.fused") if device == "cuda" and wide == torch.float32 else None
        raw = fused is not None and bias is None and softcap is None  # z is y, scaled wherever it is read
        rows = max(1, CHUNK_BYTES[device] // (len(weight) * (hidden.element_size() if raw else 4)))
        learning = any(ctx.needs_input_grad)
        keep = learning and len(hidden) <= rows and (fused is not None or softcap is None)
        rows = min(rows, CPU_ROWS) if device == "cpu" else rows
        found = hidden.new_zeros(4, len(hidden), dtype=wide)  # results, and of z the largest and log sum
        ctx.how = (1.0, None, 1.0) if raw else (scale, softcap, temperature)
        times, targets = scale / temperature if raw else 1.0, targets.contiguous()
        ctx.slopes = (times, scale / temperature, temperature / softcap if softcap else 0.0)
        ctx.rows, ctx.kept, ctx.fused, ctx.bonus = rows, [], fused, entropy_gradient
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            z = head_logits(hidden[part], weight, bias, *ctx.how)
            if fused:
                p = fused.log_softmax_rows(z, targets[part], found[:, part], times, entropy)
            else:
                p = z.softmax(1, dtype=wide)
                most, log_sum = z.amax(1).to(wide), p.amax(1).log_().neg_()  # of exp(z - most)
                found[0, part] = z.gather(1, targets[part, None]).squeeze(1).to(wide) - most - log_sum
                if entropy:
                    found[1, part] = most + log_sum - torch.linalg.vecdot(p, z.to(wide))
            if keep:
                ctx.kept.append(p)
            del z, p  # before the next chunk has its own
        chosen, entropies = found[0].clone(), found[1].clone()
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        if learning:
            ctx.save_for_backward(hidden, weight, bias, targets, found)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor, e: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, found = ctx.saved_tensors
        scale, softcap, temperature = ctx.how
        d, e = d.contiguous(), e.contiguous()
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=d.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=d.dtype) if needs_bias else None
        for begin in range(0, len(hidden), ctx.rows):
            part = slice(begin, begin + ctx.rows)
            z: Any = ctx.kept.pop(0) if ctx.kept else None  # overwritten: a second backward computes it again
            p = z
            if p is None:
                z = head_logits(hidden[part], weight, bias, *ctx.how)
                p = z if ctx.fused else z.softmax(1, dtype=d.dtype)
            if ctx.fused:
                given = (targets[part], found[:, part], d[part], e[part] if ctx.bonus else None, weight.dtype)
                gradient = ctx.fused.logits_gradient(p, *given, *ctx.slopes)
            else:
                rate, at = d[part, None], targets[part, None]
                slope = None  # what an entropy adds to -dz; 0 log 0 = 0
                if ctx.bonus:
                    slope = torch.xlogy(p, p).addcmul_(p, found[1, part, None]).mul_(e[part, None])
                p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
                if slope is not None:
                    p, rate = p.mul_(rate).add_(slope), torch.ones_like(rate)
                if softcap is not None:
                    p.mul_(z.mul_(temperature / softcap).square_().neg_().add_(1))
                into = p if p.dtype == weight.dtype else torch.empty_like(p, dtype=weight.dtype)
                gradient = torch.mul(p, rate * (-scale / temperature), out=into)
            d_hidden[part] = linear.times_transposed(gradient, weight.T)
            if d_weight is not None and d_weight.dtype == gradient.dtype:
                d_weight.addmm_(gradient.T, hidden[part])
            elif d_weight is not None:
                d_weight += gradient.T @ hidden[part]
            if d_bias is not None:
                d_bias += gradient.sum(0, dtype=d.dtype)
            del z, p, gradient  # before the next chunk has its own
        made = (x if x is None else x.to(weight.dtype) for x in (d_weight, d_bias))
        return d_hidden, *made, None, None, None, None, None, None


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """Logits (n v) of `hidden` (n d) by the temperature, in fp32 at least; a GPU's bare product as it is."""
    z = linear.times_transposed(hidden, weight)
    if z.device.type == "cuda" and bias is None and softcap is None and scale == temperature:
        return z
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if bias is None else z.add_(bias)
    if softcap is None:
        return z if scale == temperature else z.mul_(scale / temperature)
    return z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
