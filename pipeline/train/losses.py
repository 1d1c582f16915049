"""Policy losses on packed rollouts: a function a paper, by name or as `"module:function"`.

A loss is `f(tokens, **settings) -> (scalar, metrics)`; of `SETTINGS` it takes those that it names. How much
each token counts is settled once, when a batch is packed (`pack.rollout_weights`): a loss states by
`@weighted_per` what it averages over. Weights are shares of the global batch, so micro-batches and their
metrics simply add up.

Papers  GRPO       arXiv:2402.03300  Eq. 3 (objective), Eq. 4 (KL estimator)
        DAPO       arXiv:2503.14476  Eq. 8 (token-level mean, asymmetric clip)
        Dr. GRPO   arXiv:2503.20783  Sec. 3.2 (constant normalizer)
        GSPO       arXiv:2507.18071  Eq. 5 to 7 (ratio of a sequence)
        CISPO      arXiv:2506.13585  Eq. 4, 5 (clipped weight of the log-probability)
        dual clip  arXiv:1912.09729  Eq. 5 (bound for negative advantages)
        unbiased   arXiv:2512.02556  Eq. 7 (KL estimator weighted by the ratio)
Axes    n scored tokens of a micro-batch, rollouts laid end to end
Units   log-probabilities and KL in nats
"""

import functools
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.run.metrics import GLOSSARY
from pipeline.settings.rollouts import GrpoSettings, check_loss
from pipeline.train.correction import over_rollouts
from pipeline.train.pack import Per
from rewards.registry import own_function

Terms = tuple[Tensor, dict[str, Tensor]]
"""A scalar loss, and metrics that, like it, add up over micro-batches."""
Loss = Callable[..., Terms]
OWN_METRICS = {"loss/clip_frac", "loss/kl_ref"}
"""Those of our losses, which a user's may have too."""
SETTINGS = ("clip_low", "clip_high", "kl_coef", "dual_clip", "kl_estimator")
"""Settings of an RL stage that a loss may take as keywords."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The scored tokens, as a loss receives them; every tensor is `n`."""

    logprobs: Tensor
    """Current policy; the only one that carries gradient."""
    old_logprobs: Tensor
    """The old policy: as the trainer scores the policy that sampled; as the engine does with its anchor."""
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
    rollouts: int
    """Rollouts of the micro-batch; each is in it from its first token to its last."""

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` (n) over each rollout, on each of its tokens (n)."""
        return over_rollouts(values, self.rollout, self.rollouts, mean=True)


def weighted_per(per: Per) -> Callable[[Loss], Loss]:
    """Mark a loss with what its mean is over: `rollout`, `token` or `constant` (`pack.rollout_weights`)."""

    def mark(loss: Loss) -> Loss:
        loss.per = per  # type: ignore[attr-defined]
        return loss

    return mark


@weighted_per("rollout")
def grpo(
    tokens: Tokens,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    dual_clip: float = 0.0,
    kl_estimator: str = "k3",
) -> Terms:
    """Clipped surrogate less a KL penalty, negated for a minimizer (GRPO, Eq. 3).

    The mean is over the tokens of a rollout, then over rollouts.

        rho  = exp(logprobs - old_logprobs)
        loss = -sum w (min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef KL)

    `dual_clip` c bounds that minimum, where A < 0, by c A from below (dual clip, Eq. 5); 0 = it does not.
    """
    rho = (tokens.logprobs - tokens.old_logprobs).exp()
    surrogate, clipped = clipped_surrogate(rho, tokens.advantages, clip_low, clip_high)
    if dual_clip:
        least = torch.where(tokens.advantages < 0, dual_clip * tokens.advantages, -torch.inf)
        surrogate, clipped = torch.maximum(surrogate, least), clipped | (surrogate < least)
    return penalized(tokens, surrogate, clipped, kl_coef, kl_estimator)


@weighted_per("token")
def dapo(tokens: Tokens, **settings: Any) -> Terms:
    """GRPO's surrogate as a mean over all tokens: rollouts count by their length (DAPO, Eq. 8)."""
    return grpo(tokens, **settings)


@weighted_per("constant")
def dr_grpo(tokens: Tokens, **settings: Any) -> Terms:
    """GRPO's surrogate divided by a constant, so that length is neither rewarded nor punished (Dr. GRPO)."""
    return grpo(tokens, **settings)


@weighted_per("rollout")
def gspo(tokens: Tokens, *, clip_low: float, clip_high: float, kl_coef: float, kl_estimator: str) -> Terms:
    """GRPO's surrogate with one ratio a rollout, the geometric mean over its tokens (GSPO, Eq. 5 to 7).

        s    = exp(mean over the rollout of logprobs - old_logprobs)                  (Eq. 7)
        loss = -sum w (min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) - kl_coef KL)

    A rollout is clipped as a unit. Its ratio is nearer to 1 than a token's: the paper clips at 3e-4 and 4e-4.
    """
    s = tokens.mean(tokens.logprobs - tokens.old_logprobs).exp()
    surrogate, clipped = clipped_surrogate(s, tokens.advantages, clip_low, clip_high)
    return penalized(tokens, surrogate, clipped, kl_coef, kl_estimator)


@weighted_per("token")
def cispo(tokens: Tokens, *, clip_low: float, clip_high: float, kl_coef: float, kl_estimator: str) -> Terms:
    """Log-probabilities weighted by a clipped ratio without gradient: no token loses its own (CISPO, Eq. 4).

        loss = -sum w (stop_gradient(clip(rho, 1 - clip_low, 1 + clip_high)) A logprobs - kl_coef KL)

    A mean over all tokens. The paper has no lower bound: clip_low = 1.
    """
    rho = (tokens.logprobs.detach() - tokens.old_logprobs).exp()
    bounded = rho.clamp(1 - clip_low, 1 + clip_high)
    surrogate = bounded * tokens.advantages * tokens.logprobs
    return penalized(tokens, surrogate, (bounded != rho) & (tokens.advantages != 0), kl_coef, kl_estimator)


def clipped_surrogate(rho: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The lesser of `rho A` and `clip(rho, 1 - low, 1 + high) A`, and where it is the second."""
    plain = rho * advantages
    surrogate = torch.minimum(plain, rho.clamp(1 - low, 1 + high) * advantages)
    return surrogate, surrogate < plain


def penalized(tokens: Tokens, surrogate: Tensor, clipped: Tensor, kl_coef: float, kl_estimator: str) -> Terms:
    """The weighted sum of `surrogate` less the KL penalty, negated, and the metrics of both.

    The mean of `k3` (GRPO, Eq. 4) over tokens of the policy p is KL(p || reference), but the mean of its
    gradient, with the tokens held fixed, is that of KL(reference || p). Times the ratio p / old (`unbiased`,
    DeepSeek-V3.2, Eq. 7) its mean over tokens of the old policy is KL(p || reference) for every p, and so is
    the gradient. The ratio is a token's, in every loss.
    """
    kl = k3(tokens.logprobs, tokens.ref_logprobs)
    if kl_estimator == "unbiased":
        kl = (tokens.logprobs - tokens.old_logprobs).exp() * kl
    loss = -(tokens.weights * (surrogate - kl_coef * kl)).sum()
    with torch.no_grad():
        shares = clipped.to(tokens.weights)
        return loss, {"loss/clip_frac": tokens.weights @ shares, "loss/kl_ref": tokens.weights @ kl}


LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in (grpo, dapo, dr_grpo, gspo, cispo)}


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
    def call(tokens: Tokens, **settings: Any) -> Terms:
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


def settings_of(loss: Loss, config: GrpoSettings) -> dict[str, Any]:
    """The values of the settings that `loss` takes.
    Raises `ValueError`: as `takes_settings`, or one that only some losses take is set in vain."""
    taken = takes_settings(loss, config.loss)
    for name, usual in {"dual_clip": 0.0, "kl_estimator": "k3"}.items():
        if name not in taken and getattr(config, name) != usual:
            raise ValueError(f"loss {config.loss!r} does not take {name}; leave it at {usual!r}.")
    return {name: getattr(config, name) for name in taken}


def k3(p: Tensor, q: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(p || q) a token, from log-probabilities of tokens sampled from `p`."""
    gap = q - p
    return gap.expm1() - gap  # expm1: the gaps are tiny, and a KL estimate is never negative
