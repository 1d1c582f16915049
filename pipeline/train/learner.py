"""One learner for pretraining, SFT and RL: a packed batch in, one optimizer update out.

It takes any `model.Policy`. Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, Sec. 2.2) and the router's
bias (Sec. 2.1.2) are the policy's own: empty where it has none.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.policy import Policy
from pipeline.errors import UserError
from pipeline.run.guard import Guard
from pipeline.settings.common import GuardSettings, OptimSettings
from pipeline.settings.rollouts import CorrectionSettings
from pipeline.train import heap
from pipeline.train.correction import correction
from pipeline.train.logprobs import token_logprobs
from pipeline.train.losses import Loss, Terms, Tokens, k3
from pipeline.train.pack import Batch, Micro
from pipeline.train.precision import Masters, Own, load_optimizer_state, optimizer, optimizer_state


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """What an RL update minimizes; `pipeline.settings.rollouts` explains the settings."""

    loss: Loss
    settings: Mapping[str, Any]
    """Those that the loss takes."""
    temperature: float
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    entropy_coef: float = 0.0


def learning_rate(optim: OptimSettings, update: int, total: int) -> float:
    """Rate of update `update` (from 0) of `total`."""
    if update < optim.warmup_steps:
        return optim.lr * (update + 1) / optim.warmup_steps
    start = max(optim.warmup_steps, total - optim.decay_steps if optim.decay_steps else 0)
    if optim.schedule == "constant" or update < start:
        return optim.lr
    done = min(1.0, (update - start) / max(1, total - 1 - start))
    shape = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)


class Learner:
    """Owns the optimizer of a policy and makes its updates."""

    def __init__(
        self,
        policy: Policy,
        optim: OptimSettings,
        total_updates: int,
        *,
        mtp_coef: float = 0.0,
        mtp_coef_late: float | None = None,
        mtp_late_from: float = 1.0,
        guard: Guard | None = None,
    ) -> None:
        """Train `policy` in place, on the device that it lies on; schedules run over `total_updates`, and
        `guard` decides which updates are applied (None = one with the default settings).

        Multi-token prediction has weight `mtp_coef` (0: its modules are not trained), and `mtp_coef_late`, if
        that is set, from the share `mtp_late_from` of the updates on."""
        self.policy, self.optim, self.total_updates = policy, optim, total_updates
        self.device = next(policy.parameters()).device
        self.mtp_coef, self.mtp_late_from = mtp_coef, mtp_late_from
        self.mtp_coef_late = mtp_coef if mtp_coef_late is None else mtp_coef_late
        if optim.balance_alpha and not policy.routed:
            raise UserError("optim.balance_alpha is for experts, and this policy has none; set it to 0")
        try:
            policy.recompute, policy.balance_alpha = optim.recompute, optim.balance_alpha
        except ValueError as error:
            raise UserError(f"{error} Switch it off: --optim.no-recompute") from error
        if self.device.type == "cpu":
            heap.keep_freed(short=optim.recompute)
        # What the optimizer steps: the policy's own parameters, or fp32 masters of them.
        self.weights = Own(policy) if optim.precision == "float32" else Masters(policy, optim.precision)
        self.adamw = optimizer(self.weights.stepped, optim)
        self.draft_coef = 0.0  # see `train_drafts`
        self.clipped = [self.weights.stepped]  # parameters whose gradients are clipped together
        self.guard = guard or Guard(GuardSettings(), optim.clip)
        self.updates = 0
        self.scored: list[tuple[Micro, Tensor]] = []  # of the latest policy update: parts, log-probabilities
        self.early: int | None = None  # the last update, since `decay_now`

    def train_drafts(self, coef: float) -> None:
        """Have `policy_update` train the MTP modules too, with weight `coef`, and the trunk as without: what
        they learn from is detached, their gradient is clipped apart. Raises `UserError`: there are none."""
        drafts = [name.startswith("mtp.") for name, p in self.policy.named_parameters() if p.requires_grad]
        if not any(drafts):
            raise UserError("mtp_coef is for policies with MTP modules, and this one has none; set it to 0")
        self.draft_coef, both = coef, list(zip(drafts, self.weights.stepped, strict=True))
        self.clipped = [[p for draft, p in both if draft is of] for of in (False, True)]

    def decay_now(self) -> None:
        """Let the rate fall from the next update on, and end `optim.decay_steps` updates later."""
        self.total_updates = self.early = min(self.total_updates, self.updates + self.optim.decay_steps)

    # ---- losses

    def update(self, batch: Batch, terms: Callable[[Micro], Terms]) -> dict[str, float]:
        """One update on the sum of `terms(part)`, a loss and its metrics, over the micro-batches. Metrics add
        up; of one whose name ends in `_max` the largest counts."""
        sums, sequences = dict[str, Tensor](), len(batch.lengths)
        for part in batch.micro_batches(self.device):
            loss, metrics = terms(part)
            loss = loss + self._balance(part, sequences, sums)
            loss.backward()
            add(sums, metrics | {"loss/total": loss.detach()})
        return self._step(sums)

    def states(self, part: Micro) -> Tensor:
        """Final-normed states (n d) before the n tokens of `part` that have weight; others are not scored."""
        return self.hidden(part)[0, part.ahead(1)[0]]

    def hidden(self, part: Micro) -> Tensor:
        """Final-normed states (1 t d), with the routes that an engine recorded, if any."""
        return self.policy.hidden(part.token_ids, part.packed, part.routed_experts)

    def supervised_update(self, batch: Batch) -> dict[str, float]:
        """One update on the weighted cross-entropy of `batch`, plus that of the MTP modules."""
        late = self.updates >= self.mtp_late_from * self.total_updates

        def terms(part: Micro) -> Terms:
            if self.mtp_coef:
                hidden, further = self.policy.hidden_and_mtp(part.token_ids, part.packed)
            else:
                hidden, further = self.policy.hidden(part.token_ids, part.packed), []
            loss = self._cross_entropy(hidden, part, 1)
            metrics = {"loss/lm": loss.detach()}
            if further:
                each = [self._cross_entropy(h, part, k) for k, h in enumerate(further, start=2)]
                mtp = torch.stack(each).mean()
                metrics["loss/mtp"] = mtp.detach()
                loss = loss + (self.mtp_coef_late if late else self.mtp_coef) * mtp
            return loss, metrics

        return self.update(batch, terms)

    def policy_update(
        self,
        batch: Batch,
        objective: PolicyObjective,
        old_logprobs: list[Tensor] | None,
        reference: Policy | None,
    ) -> dict[str, float]:
        """One update on a policy loss less the entropy bonus, both in the batch's token weights.

        `old_logprobs` has a tensor a micro-batch, from `score`. None: the update is the first since sampling,
        so the trainer's old policy is the current one. `reference` is None where there is no KL penalty."""
        scored, olds = batch.scored, iter(old_logprobs or ())
        self.scored = []
        bonus, bounds = objective.entropy_coef, objective.correction

        def terms(part: Micro) -> Terms:
            places, targets, weights = part.ahead(1)
            hidden, how = self.hidden(part), (self.policy.head, targets, objective.temperature)
            logprobs, entropy = token_logprobs(hidden[0, places], *how, entropy_gradient=bool(bonus))
            trainer = logprobs.detach() if old_logprobs is None else next(olds)
            self.scored.append((part, trainer))
            ref = logprobs.detach() if reference is None else score(reference, part, objective.temperature)
            sampled, rollout, rollouts = part.rollout_logprobs, part.rollout, len(part.packed.lengths)
            old = sampled if bounds.anchor == "engine" else trainer
            ratio, outside = correction(old, sampled, rollout, rollouts, bounds)
            tokens = Tokens(
                logprobs=logprobs,
                old_logprobs=old,
                rollout_logprobs=sampled,
                ref_logprobs=ref,
                advantages=part.advantages * ratio,
                weights=weights,
                rollout=rollout,
                rollouts=rollouts,
            )
            loss, metrics = objective.loss(tokens, **objective.settings)
            ours = {"loss/policy": loss.detach(), "policy/corrected": outside.sum() / scored}
            metrics = metrics | ours | sampling_metrics(part, trainer, entropy.detach(), scored)
            loss = loss - bonus * (weights @ entropy) if bonus else loss
            if self.draft_coef:
                mtp = self._drafting(hidden, part, objective.temperature) / scored
                loss, metrics = loss + self.draft_coef * mtp, metrics | {"loss/mtp": mtp.detach()}
            return loss, metrics

        return self.update(batch, terms)

    def _balance(self, part: Micro, sequences: int, sums: dict[str, Tensor]) -> Tensor | float:
        """The micro-batch's share of the weighted balance loss, a mean over all `sequences` (Eq. 17)."""
        if not self.optim.balance_alpha:
            return 0.0
        loss = self.policy.pop_balance_loss() * (len(part.packed.lengths) / sequences)
        add(sums, {"loss/balance": loss.detach() / self.optim.balance_alpha})
        return loss

    def _drafting(self, hidden: Tensor, part: Micro, temperature: float) -> Tensor:
        """Cross-entropy of the MTP modules, a sum over the scored tokens and a mean over the modules, at the
        temperature of sampling: they guess at that too."""
        head = self.policy.head
        head = head._replace(weight=head.weight.detach())
        found = []
        for k, h in enumerate(
            self.policy.mtp_states(hidden, part.token_ids, part.packed, detached=True), start=2
        ):
            states, targets, _ = part.ahead(k)
            found.append(-token_logprobs(h[0, states], head, targets, temperature, entropy=False)[0].sum())
        return torch.stack(found).mean()

    def _cross_entropy(self, hidden: Tensor, part: Micro, ahead: int) -> Tensor:
        """Weighted cross-entropy of the token `ahead` positions later, within the same sequence."""
        states, targets, weights = part.ahead(ahead)
        logprobs, _ = token_logprobs(hidden[0, states], self.policy.head, targets, entropy=False)
        return -(weights @ logprobs)

    # ---- the update

    def _step(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Clip, step, `Policy.after_update`. An update that the guard does not accept changes nothing; of its
        metrics the finite ones are returned. Raises `Diverged`: the guard has skipped too many."""
        self.weights.collect()
        norms = [nn.utils.clip_grad_norm_(part, self.optim.clip or math.inf) for part in self.clipped]
        values = [torch.as_tensor(value, device=self.device).double() for value in (*sums.values(), *norms)]
        found = torch.stack(values).tolist()  # the one wait for a GPU
        metrics, norm = dict(zip(sums, found, strict=False)), found[len(sums)]
        rate = learning_rate(self.optim, self.updates, self.total_updates)
        accepted = self.guard.accepts(norm, finite=all(map(math.isfinite, found)))
        if accepted:
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
            self.weights.publish()
        self.weights.clear()
        metrics |= self.policy.after_update(self.optim.router_bias_gamma if accepted else 0.0)
        metrics |= {"optim/lr": rate, "optim/grad_norm": norm, "optim/skipped": self.guard.skipped}
        self.updates += 1
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "policy": self.policy.state_dict(),
            "adamw": optimizer_state(self.adamw, self.weights),
            "updates": self.updates,
            "early": self.early,
            "guard": self.guard.state_dict(),
            **self.weights.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, to the same bits."""
        self.policy.load_state_dict(state["policy"])
        self.weights.load_state_dict(state)
        load_optimizer_state(self.adamw, self.weights, state["adamw"])
        self.updates, self.early = state["updates"], state["early"]
        self.total_updates = self.early or self.total_updates
        self.guard.load_state_dict(state["guard"])


def add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add `values` into `sums`, key by key; of a key that ends in `_max`, keep the larger."""
    for key, value in values.items():
        joined = torch.maximum if key.endswith("_max") else torch.add
        sums[key] = joined(sums[key], value) if key in sums else value


def sampling_metrics(part: Micro, logprobs: Tensor, entropy: Tensor, scored: int) -> dict[str, Tensor]:
    """Entropy, and what separates the engine's log-probabilities from the trainer's (n): means over the
    `scored` tokens of the update."""
    sampled = part.rollout_logprobs
    return {
        "policy/entropy": entropy.sum() / scored,
        "policy/mismatch_kl": k3(sampled, logprobs).sum() / scored,
        "policy/mismatch_max": (sampled - logprobs).abs().max(),
    }


@torch.no_grad()
def score(policy: Policy, part: Micro, temperature: float, routed_experts: Tensor | None = None) -> Tensor:
    """Log-probabilities of the scored tokens of one micro-batch, `n`, without gradient.

    `routed_experts`: those of `part`, for the policy that sampled it. A reference chooses its own: with
    another's it would be another distribution, and the KL penalty one from a model that was never trained."""
    states, targets, _ = part.ahead(1)
    was_training = policy.training
    policy.eval()
    hidden = policy.hidden(part.token_ids, part.packed, routed_experts)[0, states]
    policy.train(was_training)
    return token_logprobs(hidden, policy.head, targets, temperature, entropy=False)[0]
