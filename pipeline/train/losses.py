"""Policy losses on packed rollouts: a function a paper, by name or as `"module:function"`.

A loss is `f(tokens, *, clip_low, clip_high, kl_coef) -> (scalar, metrics)`; it takes those settings that it
names. How much each token counts is settled once, when a batch is packed (`pack.rollout_weights`): a loss
states by `@weighted_per` what it averages over. Weights are shares of the global batch, so micro-batches and
their metrics simply add up.

Papers  GRPO      arXiv:2402.03300  Eq. 3 (objective), Eq. 4 (KL estimator)
        DAPO      arXiv:2503.14476  Eq. 8 (token-level mean, asymmetric clip)
        Dr. GRPO  arXiv:2503.20783  Sec. 3.2 (constant normalizer)
Axes    n scored tokens of a micro-batch, rollouts laid end to end
Units   log-probabilities and KL in nats
"""

import functools
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.run.metrics import GLOSSARY
from pipeline.settings.rollouts import check_loss
from pipeline.train.pack import Per
from rewards.registry import own_function

Terms = tuple[Tensor, dict[str, Tensor]]
"""A scalar loss, and metrics that, like it, add up over micro-batches."""
Loss = Callable[..., Terms]
OWN_METRICS = {"loss/clip_frac", "loss/kl_ref"}
"""Those of our losses, which a user's may have too."""
SETTINGS = ("clip_low", "clip_high", "kl_coef")
"""Settings of an RL stage that a loss may take as keywords."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The scored tokens, as a loss receives them; every tensor is `n`."""

    logprobs: Tensor
    """Current policy; the only one that carries gradient."""
    old_logprobs: Tensor
    """The policy that sampled, as the trainer (not the engine) scores it."""
    rollout_logprobs: Tensor
    """The policy that sampled, as the engine reported it."""
    ref_logprobs: Tensor
    """Frozen reference policy; `logprobs` without gradient where there is none."""
    advantages: Tensor
    """A rollout's advantage on each of its tokens, times the correction between engine and trainer."""
    weights: Tensor
    """Each token's share of the loss."""
    rollout: Tensor
    """Index of each token's rollout in the micro-batch, from 0."""


def weighted_per(per: Per) -> Callable[[Loss], Loss]:
    """Mark a loss with what its mean is over: `rollout`, `token` or `constant` (`pack.rollout_weights`)."""

    def mark(loss: Loss) -> Loss:
        loss.per = per  # type: ignore[attr-defined]
        return loss

    return mark


@weighted_per("rollout")
def grpo(tokens: Tokens, *, clip_low: float, clip_high: float, kl_coef: float) -> Terms:
    """Clipped surrogate less a KL penalty, negated for a minimizer (GRPO, Eq. 3).

    The mean is over the tokens of a rollout, then over rollouts.

        rho  = exp(logprobs - old_logprobs)
        k3   = exp(ref - logprobs) - (ref - logprobs) - 1                             (Eq. 4)
        loss = -sum w (min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef k3)
    """
    advantages, weights = tokens.advantages, tokens.weights
    rho = (tokens.logprobs - tokens.old_logprobs).exp()
    surrogate = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    kl = k3(tokens.logprobs, tokens.ref_logprobs)
    loss = -(weights * (surrogate - kl_coef * kl)).sum()
    with torch.no_grad():
        clipped = (surrogate < rho * advantages).to(weights)
        return loss, {"loss/clip_frac": weights @ clipped, "loss/kl_ref": weights @ kl}


@weighted_per("token")
def dapo(tokens: Tokens, **settings: float) -> Terms:
    """GRPO's surrogate as a mean over all tokens: rollouts count by their length (DAPO, Eq. 8)."""
    return grpo(tokens, **settings)


@weighted_per("constant")
def dr_grpo(tokens: Tokens, **settings: float) -> Terms:
    """GRPO's surrogate divided by a constant, so that length is neither rewarded nor punished (Dr. GRPO)."""
    return grpo(tokens, **settings)


LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in (grpo, dapo, dr_grpo)}


def loss_named(name: str) -> Loss:
    """The loss of that name, or the function of "module:function".
    Raises `ValueError`: no such loss (with the nearest), or a function that does not take `tokens` first, or
    takes settings that RL stages do not have."""
    check_loss(name)
    if name in LOSSES:
        return LOSSES[name]
    found: Loss = own_function(name)
    takes_settings(found, name)
    return one_line_errors(found, name)


def one_line_errors(loss: Loss, name: str) -> Loss:
    """A user's `loss`, with a `UserError` of one line where it fails or does not return `Terms`."""

    @functools.wraps(loss)
    def call(tokens: Tokens, **settings: float) -> Terms:
        try:
            value, metrics = loss(tokens, **settings)
            if taken := sorted((set(GLOSSARY) - OWN_METRICS) & set(metrics)):
                raise ValueError(f"its metric {taken[0]} is one of ours; rename it")
            if not all(x.numel() == 1 for x in (value, *metrics.values())) or not value.requires_grad:
                raise ValueError("it must return (scalar tensor from tokens.logprobs, {name: scalar tensor})")
            return value, metrics
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UserError(f"loss {name!r} failed at {at.filename}:{at.lineno}: {why}") from error

    return call


def takes_settings(loss: Loss, name: str) -> set[str]:
    """The settings that a loss takes by keyword.
    Raises `ValueError`: it needs others too, or not `tokens` alone by position."""
    try:
        parameters = inspect.signature(loss).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        taken = set(SETTINGS) if every else set(SETTINGS) & set(parameters)
        inspect.signature(loss).bind("tokens", **dict.fromkeys(taken))
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name!r} is not f(tokens, *, {', '.join(SETTINGS)}): {error}") from error
    return taken


def k3(p: Tensor, q: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(p || q) a token, from log-probabilities of tokens sampled from `p`."""
    gap = q - p
    return gap.expm1() - gap  # expm1: the gaps are tiny, and a KL estimate is never negative
