"""Divergence of a student from its teacher at each token, over the whole vocabulary, with its exact gradient.

    s = softmax(z / T)   t = softmax(teacher's logits / T)   m = beta t + (1 - beta) s     T: temperature

    reverse_kl   D = KL(s || t)                              dD/dz = s (g - s.g) / T,  g = log(s / t)
    forward_kl   D = KL(t || s)                              dD/dz = (s - t) / T
    jsd          D = beta KL(t || m) + (1 - beta) KL(s || m)    as reverse_kl,  g = (1 - beta) log(s / m)

The samples are taken as given: no gradient flows through the sampling.

Papers  GKD      arXiv:2306.13649  Sec. 2 (the three divergences), Sec. 3 (on the student's own samples)
        MiniLLM  arXiv:2306.08543  Sec. 2.1 (reverse KL)
Axes    n scored tokens of a micro-batch; d hidden size, of student and teacher each; v vocabulary
Units   divergence and entropy in nats
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.cpu import linear
from model.policy import Head
from pipeline.train.logprobs import CHUNK_BYTES, CPU_ROWS, head_logits

ARRAYS = 6
"""Tensors as wide as the vocabulary that a chunk holds at once, beside its logits."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which one; `pipeline.settings.rollouts.OnPolicySettings` explains the settings."""

    kind: str
    beta: float
    temperature: float

    def of(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """Values (n), and gradients by the student's logits / T (n v); of log-probabilities (n v)."""
        s = log_s.exp()
        if self.kind == "forward_kl":
            t = log_t.exp()
            return torch.linalg.vecdot(t, log_t - log_s), s - t
        if self.kind == "reverse_kl":
            g, others = log_s - log_t, 0.0
        else:
            log_m = torch.logaddexp(log_t + math.log(self.beta), log_s + math.log1p(-self.beta))
            g = (1 - self.beta) * (log_s - log_m)
            others = self.beta * torch.linalg.vecdot(log_t.exp(), log_t - log_m)
        own = torch.linalg.vecdot(s, g)
        return own + others, s.mul_(g.sub_(own[:, None]))


def weighted_divergence(
    divergence: Divergence,
    hidden: Tensor,
    head: Head,
    taught: Tensor,
    teacher: Head,
    targets: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of weights x divergences (scalar, with gradient); the student's log-probabilities of the
    `targets` and its entropies there (n, without).

    `hidden` and `taught` (n d) are the final-normed states of student and teacher before the `targets` (n).
    The teacher's head has at least as many rows; those beyond the student's are padding and left out.

    Chunk by chunk, in one pass: as the weights are known, the gradients are summed up beside the values, so
    that no logits are computed twice and none outlive their chunk."""
    size, temperature, device = len(head.weight), divergence.temperature, hidden.device.type
    bias = None if teacher.bias is None else teacher.bias[:size]
    teacher = teacher._replace(weight=teacher.weight[:size], bias=bias)
    rows = max(1, CHUNK_BYTES[device] // (4 * ARRAYS * size))
    rows = min(rows, CPU_ROWS) if device == "cpu" else rows
    wide = torch.promote_types(hidden.dtype, torch.float32)
    leaves = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    with torch.no_grad():
        total, logprobs, entropies = torch.zeros((), dtype=wide, device=hidden.device), [], []
        d_hidden, *sums = (torch.zeros_like(leaf, dtype=wide) for leaf in leaves)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            z = head_logits(hidden[part], *head, temperature)
            log_s = z.log_softmax(1, dtype=wide)
            log_t = head_logits(taught[part], *teacher, temperature).log_softmax(1, dtype=wide)
            logprobs.append(log_s.gather(1, targets[part, None]).squeeze(1))
            entropies.append(-torch.linalg.vecdot(log_s.exp(), log_s))
            values, dz = divergence.of(log_s, log_t)
            total += weights[part].to(wide) @ values
            if head.softcap is not None:
                dz.mul_(z.mul_(temperature / head.softcap).square_().neg_().add_(1))
            dy = dz.mul_((weights[part] * (head.scale / temperature))[:, None]).to(hidden.dtype)
            d_hidden[part] = linear.times_transposed(dy, head.weight.T)
            sums[0] += dy.T @ hidden[part]
            if head.bias is not None:
                sums[1] += dy.sum(0, dtype=wide)
    gradients = [d.to(leaf.dtype) for d, leaf in zip((d_hidden, *sums), leaves, strict=True)]
    loss: Tensor = _Known.apply(total, gradients, *leaves)
    return loss, torch.cat(logprobs), torch.cat(entropies)


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(d * gradient for gradient in ctx.gradients)
