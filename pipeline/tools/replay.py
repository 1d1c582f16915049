"""`python -m pipeline replay RUN_STAGE_DIR --step N [--loss gspo ...]`: a recorded RL step once more.

The update is repeated from the record alone, and the weights are compared with those that it left. With
settings of another objective, the gradient of this is computed before each update too.

The last line on stdout is JSON: `step` and `same_bits`; of the last update `loss` and `grad_norm` (before
clipping) of the other objective, or else of the recorded one, and the `cosine` of the two gradients, null
where one is zero; `recorded`, the same of the recorded one; `differs`, what else is not as it was then.

A token's contribution is the derivative of the loss by its log-probability (above 0: an update makes it less
likely). The gradient is the sum of contribution times gradient of the log-probability, over all tokens.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.arguments import known_flags, nearest, parse, split
from pipeline.errors import UserError
from pipeline.run.guard import Diverged, Guard
from pipeline.settings.rollouts import NOT_OF_THE_UPDATE, GrpoSettings, ReplaySettings, RoundSettings
from pipeline.stages.grpo import Trainer
from pipeline.tools.record import changed, here, load_record, prints
from pipeline.train.learner import Learner
from pipeline.train.losses import Terms, Tokens
from pipeline.train.pack import Batch, Example
from pipeline.train.place import Place
from pipeline.train.policy import load_policy
from pipeline.train.rollouts import example
from rollout.collect import Round
from rollout.types import Graded

PROG = "python -m pipeline replay"
SHOWN = 10
"""Tokens in the table."""


class Found(NamedTuple):
    """What one objective makes of one update."""

    loss: float = 0.0
    norm: float = 0.0
    gradient: Tensor = torch.zeros(1)
    tokens: dict[tuple[bytes, int], list[float]] = {}  # noqa: RUF012
    """By rollout and place: contribution, advantage, policy / engine. Equal rollouts count once."""

    def cosine(self, other: "Found") -> float | None:
        """Of the two gradients; None where one is zero."""
        a, b = self.gradient.double(), other.gradient.double()
        return float(a @ b / a.norm() / b.norm()) if a.any() and b.any() else None


class Keeper(Guard):
    """The run's guard, which keeps the latest gradient, and accepts none of a `trial`."""

    trial, norm = False, 0.0
    stepped: Sequence[Tensor]
    gradient: Tensor

    def accepts(self, norm: float, *, finite: bool = True) -> bool:
        """See `Guard`."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.stepped]
        self.norm, self.gradient = norm, torch.cat([grad.flatten() for grad in grads])
        return not self.trial and super().accepts(norm, finite=finite)


class Replay(Trainer):
    """One objective's trainer of a recorded step, without engine, problems and graders."""

    def __init__(
        self, config: GrpoSettings, place: Place, learner: Learner, guard: Keeper, reference: Any
    ) -> None:
        """Raises `UserError`: a loss that cannot be used, or a KL penalty without a recorded reference."""
        if config.kl_coef and reference is None:
            raise UserError("the step was recorded without a reference (kl_coef 0): leave --kl-coef out")
        self.aim(config)
        self.config, self.place, self.learner, self.policy = config, place, learner, learner.policy
        self.guard, self.reference = guard, reference if config.kl_coef else None

    def gradient(self, batch: Batch, old: list[Tensor] | None, trial: bool) -> Found:
        """Of one update, which is made unless it is a `trial`."""
        seen: list[list[Tensor]] = []

        def loss(tokens: Tokens, **settings: Any) -> Terms:
            ratio = (tokens.logprobs - tokens.rollout_logprobs).exp().detach()
            seen.append([tokens.rollout, torch.zeros_like(ratio), tokens.advantages, ratio])
            tokens.logprobs.register_hook(lambda grad, to=seen[-1]: to.__setitem__(1, grad))
            return self.objective.loss(tokens, **settings)

        if not batch.parts:
            return Found()
        self.guard.trial = trial
        objective = dataclasses.replace(self.objective, loss=loss)
        metrics = self.learner.policy_update(batch, objective, old, self.reference)
        self.learner.updates -= trial
        tokens = {}
        for micro, part, columns in zip(batch.micro_batches(), batch.parts, seen, strict=True):
            names = [name_of(one) for one in part]
            for at, i, *row in zip(micro.positions.tolist(), *(x.tolist() for x in columns), strict=True):
                tokens[names[i], at] = row
        return Found(metrics.get("loss/total", math.inf), self.guard.norm, self.guard.gradient, tokens)


def name_of(one: Example) -> bytes:
    """What tells rollouts apart: token ids and the engine's log-probabilities."""
    return np.asarray(one.token_ids, np.int32).tobytes() + np.asarray(one.rollout_logprobs).tobytes()


def overrides(flags: Sequence[str]) -> list[str]:
    """Flags of the objective's settings, with their groups. Raises `UserError`: one of other settings."""
    fixed = {f.name for f in dataclasses.fields(RoundSettings)} - {"temperature", "micro_tokens"}
    known, out = dict[str, str](), list[str]()
    for flag in known_flags(GrpoSettings):
        root = flag[2:].partition(".")[0].replace("-", "_")
        if not {root, root.removeprefix("no_")} & (fixed | NOT_OF_THE_UPDATE):
            known |= {flag: flag, f"--{flag[2:].rpartition('.')[2]}": flag}
    for arg in flags:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
        full = known.get(flag.replace("_", "-"), "" if arg.startswith("--") else arg)
        if not full:
            there = f"there are {', '.join(dict.fromkeys(known.values()))}"
            raise UserError(f"{PROG}: {flag} is no setting of an objective{nearest(flag, known)}; {there}")
        out.append(full + equals + value)
    return out


def show(updates: list[list[Found]], titles: list[str], graded: Sequence[Graded], tokenizer: Any) -> None:
    """Tables of gradients, and of the tokens whose contributions to two gradients differ most."""
    table = Table("update", "objective", "loss", "gradient norm", "tokens that count", "cosine")
    tokens = Table("rollout", "position", "token", "advantage", "policy / engine", *titles)
    rollouts = {name_of(example(g.rollout, 0.0, 1.0)): (i, g.rollout) for i, g in enumerate(graded)}
    rows = []
    for number, found in enumerate(updates, start=1):
        for of, title in zip(found, titles, strict=True):
            values = of.loss, of.norm, sum(bool(row[0]) for row in of.tokens.values()), of.cosine(found[0])
            table.add_row(str(number), title, *("none" if x is None else f"{x:.6g}" for x in values))
        for name, about in (found[-1].tokens | found[0].tokens).items():
            shares = [of.tokens.get(name, [0.0])[0] for of in found]
            rows.append((abs(shares[0] - shares[-1]), name, [*about[1:], *shares]))
    for gap, (rollout_name, at), shown in sorted(rows, key=lambda row: -row[0])[:SHOWN]:
        number, rollout = rollouts[rollout_name]
        place = at - len(rollout.prompt.token_ids)
        token = repr(tokenizer.decode([rollout.token_ids[place]]))
        if gap:
            tokens.add_row(str(number), str(place), token, *(f"{x:.4g}" for x in shown))
    console = Console(highlight=False, markup=False, soft_wrap=True, width=140)
    console.print(table, *(["contributions that differ most:", tokens] if tokens.rows else []))


def main(argv: Sequence[str]) -> None:
    """The command."""
    own, flags = split(ReplaySettings, argv)
    config = parse(ReplaySettings, own, PROG, positional=True)
    flags = overrides(flags)
    folder, manifest, state = load_record(config.folder, config.step)
    settings = [parse(GrpoSettings, f, PROG, file=folder / "config.toml") for f in ([], flags)]
    now, threads = settings[0], manifest["environment"]["threads"]
    place = Place.open(dataclasses.replace(now, device=config.device, threads=threads))
    policy, tokenizer = load_policy(folder / "policy", place.device)
    guard = Keeper(now.guard, now.optim.clip)
    policy.router_replay = now.router_replay
    learner = Learner(policy, now.optim, now.steps * now.minibatches, guard=guard)
    if now.mtp_coef:
        learner.train_drafts(now.mtp_coef)
    if wrong := changed(manifest["before"], prints(policy)):
        raise UserError(
            f"{folder} has other weights than its step began with, in {min(wrong)}; record it again"
        )
    learner.load_state_dict(state["learner"] | {"policy": policy.state_dict()})
    guard.stepped = learner.weights.stepped
    reference = policy.frozen() if state["reference"] else None
    if reference is not None:
        reference.load_state_dict(state["reference"])
    graded, updates = Round.from_plain(state["round"]).graded, list[list[Found]]()
    trainers = [Replay(each, place, learner, guard, reference) for each in settings[: 1 + bool(flags)]]
    differs = changed(manifest["environment"], here())
    if trainers[0].advantages(graded) != state["advantages"]:
        differs["advantages"] = ["those recorded", "the code computes others"]
    plans = [trainer.batches(graded, trainer.advantages(graded)) for trainer in trainers]
    olds = [trainer.old_logprobs(plan) for trainer, plan in zip(trainers, plans, strict=True)]
    with suppress(Diverged):  # as the recorded update did
        for at in range(now.minibatches):
            made = [(t, plan[at], old[at]) for t, plan, old in zip(trainers, plans, olds, strict=True)]
            trials = [t.gradient(batch, old, True) for t, batch, old in made[1:]]
            updates.append([made[0][0].gradient(*made[0][1:], False), *trials])
    show(updates, ["recorded", " ".join(flags)][: len(trainers)], graded, tokenizer)
    wrong = changed(manifest["after"], prints(policy))
    print(
        f"other bits in {len(wrong)} tensors, such as {min(wrong)}" if wrong else "the same bits as recorded"
    )
    for name, (before, after) in differs.items():
        print(f"  {name}: {before} when it was recorded, now {after}")
    last = updates[-1] if updates else [Found() for _ in trainers]
    values = [{"loss": of.loss, "grad_norm": of.norm, "cosine": of.cosine(last[0])} for of in last]
    result = {"step": manifest["step"], "same_bits": not wrong, **values[-1], "recorded": values[0]}
    print(json.dumps(result | {"differs": differs}))
