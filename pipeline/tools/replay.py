"""`python -m pipeline replay RUN_STAGE_DIR --step N [--loss gspo ...]`: a recorded RL step once more.

The update is repeated from the record alone, and the weights are compared with those that it left. With
settings of another objective its gradient is computed too, each time before the recorded objective updates.

The last line on stdout is JSON: `step`, `same_bits`; of the last update `loss` and `grad_norm`, before
clipping, of the other objective, or of the recorded one where there is no other, and the `cosine` of their
gradients, null where one is zero; `recorded`, the recorded one's loss and norm; `differs`, what differs from
when the step was recorded.

A token's contribution is the derivative of the loss by its log-probability: the gradient is the sum over
tokens of contribution times gradient of the log-probability (and what losses have beside those).
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.policy import Policy
from pipeline.arguments import known_flags, nearest, parse, split
from pipeline.errors import UserError
from pipeline.run.guard import Diverged, Guard
from pipeline.settings.rollouts import NOT_OF_THE_UPDATE, GrpoSettings, RoundSettings
from pipeline.settings.tools import ReplaySettings
from pipeline.stages.grpo import Trainer
from pipeline.tools.record import here, prints, read_record
from pipeline.train.learner import Learner
from pipeline.train.losses import Terms, Tokens
from pipeline.train.pack import Batch, Example
from pipeline.train.place import Place
from pipeline.train.policy import load_policy
from pipeline.train.rollouts import example
from rollout.collect import Round
from rollout.types import Graded

PROG = "python -m pipeline replay"
Name = tuple[bytes, int]
"""Of a token: its sequence, see `name_of`, and its place there."""


@dataclass(slots=True)
class Found:
    """What one objective makes of one update."""

    loss: float = 0.0
    norm: float = 0.0
    gradient: list[Tensor] = field(default_factory=list)
    tokens: dict[Name, tuple[float, ...]] = field(default_factory=dict)
    """Contribution, advantage, and ratio of policy and engine; of equal rollouts the last one's."""

    def cosine(self, other: "Found") -> float | None:
        """Of the two gradients; None where one is zero."""
        a, b = (
            torch.cat([g.flatten() for g in of.gradient or [torch.zeros(1)]]).double() for of in (self, other)
        )
        lengths = float(a.norm() * b.norm())
        return float(a @ b) / lengths if lengths else None


class Keeper(Guard):
    """The run's guard, which keeps each gradient, and accepts none of a `trial`."""

    trial, norm = False, 0.0
    stepped: list[Tensor]
    gradient: list[Tensor]

    def accepts(self, norm: float, *, finite: bool = True) -> bool:
        """See `Guard`."""
        self.norm = norm
        self.gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.stepped]
        return not self.trial and super().accepts(norm, finite=finite)


class Replay(Trainer):
    """A trainer without engine, problems and graders, for one objective on a recorded step."""

    def __init__(
        self, config: GrpoSettings, place: Place, learner: Learner, guard: Keeper, reference: Policy | None
    ) -> None:
        """Raises `UserError`: a loss that cannot be used, or a KL penalty without a recorded reference."""
        if config.kl_coef and reference is None:
            raise UserError("the step was recorded without a reference (kl_coef 0): leave --kl-coef out")
        self.aim(config)
        self.config, self.place, self.learner, self.policy = config, place, learner, learner.policy
        self.guard, self.reference = guard, reference if config.kl_coef else None

    def minibatches(self, graded: Sequence[Graded], several: bool) -> list[list[tuple[Batch, Any]]]:
        """Of each minibatch its batch and old log-probabilities, or nothing; `several` as for these."""
        advantages, share = self.advantages(graded), len(graded) // self.config.minibatches
        self.config = dataclasses.replace(self.config, minibatches=1)
        starts = range(0, len(graded), share)
        found = [self.batches(graded[at : at + share], advantages[at : at + share]) for at in starts]
        several = several or sum(map(len, found)) > 1
        return [list(zip(of, self.old_logprobs(of, several), strict=True)) for of in found]

    def gradient(self, batch: Batch, old: list[Tensor] | None, trial: bool) -> Found:
        """Of one update, which is made unless it is a `trial`."""
        seen: list[list[Tensor]] = []

        def loss(tokens: Tokens, **settings: Any) -> Terms:
            ratio = (tokens.logprobs - tokens.rollout_logprobs).exp().detach()
            seen.append([tokens.rollout, torch.zeros_like(ratio), tokens.advantages, ratio])
            tokens.logprobs.register_hook(partial(_keep, seen[-1][1]))
            return self.objective.loss(tokens, **settings)

        self.guard.trial = trial
        objective = dataclasses.replace(self.objective, loss=loss)
        metrics = self.learner.policy_update(batch, objective, old, self.reference)
        self.learner.updates -= trial
        found = Found(metrics.get("loss/total", math.inf), self.guard.norm, self.guard.gradient)
        for micro, part, columns in zip(batch.micro_batches(), batch.parts, seen, strict=True):
            names = [name_of(one) for one in part]
            for at, i, *row in zip(micro.positions.tolist(), *(x.tolist() for x in columns), strict=True):
                found.tokens[names[i], at] = tuple(row)
        return found


def _keep(into: Tensor, grad: Tensor) -> None:
    into.copy_(grad)


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
        if arg.startswith("--") and flag.replace("_", "-") not in known:
            there = f"there are {', '.join(dict.fromkeys(known.values()))}"
            raise UserError(f"{PROG}: {flag} is no setting of an objective{nearest(flag, known)}; {there}")
        out.append(known.get(flag.replace("_", "-"), flag) + equals + value)
    return out


def repeat(trainers: Sequence[Replay], graded: Sequence[Graded]) -> list[list[Found]]:
    """The updates of the first trainer, with what each would have made of them."""
    several = trainers[0].config.minibatches > 1
    plans = [trainer.minibatches(graded, several and i > 0) for i, trainer in enumerate(trainers)]
    updates = []
    with suppress(Diverged):  # as the recorded update did
        for batches in zip(*plans, strict=True):
            found = [Found() for _ in trainers]
            for i in reversed(range(len(trainers))):
                for batch, old in batches[i]:
                    found[i] = trainers[i].gradient(batch, old, trial=i > 0)
            updates += [found] if any(batches) else []
    return updates


def show(
    updates: list[list[Found]], titles: list[str], graded: Sequence[Graded], tokenizer: Any, most: int
) -> None:
    """Tables of gradients and of the `most` tokens whose contributions differ, or are largest."""
    console = Console(highlight=False, markup=False, soft_wrap=True, width=140)
    table = Table("update", "objective", "loss", "gradient norm", "tokens that count", "cosine")
    for number, found in enumerate(updates, start=1):
        for of, title in zip(found, titles, strict=True):
            cosine, count = of.cosine(found[0]), sum(bool(row[0]) for row in of.tokens.values())
            shown = "none" if cosine is None else f"{cosine:.6f}"
            table.add_row(str(number), title, f"{of.loss:.6g}", f"{of.norm:.6g}", str(count), shown)
    console.print(table)
    sequences = [(name_of(example(g.rollout, 0.0, 1.0)), g.rollout) for g in graded]
    known = {name: (i, rollout) for i, (name, rollout) in enumerate(sequences)}
    rows = []
    for found in updates:
        for (name, at), about in {
            key: row for of in reversed(found) for key, row in of.tokens.items()
        }.items():
            shares = [of.tokens.get((name, at), (0.0,))[0] for of in found]
            rows.append((abs(shares[0] - (shares[1] if shares[1:] else 0.0)), name, at, about[1:], shares))
    table = Table("rollout", "position", "token", "advantage", "policy / engine", *titles)
    for gap, name, at, about, shares in sorted(rows, key=lambda row: -row[0])[:most]:
        i, rollout = known[name]
        place = at - len(rollout.prompt.token_ids)
        token = repr(tokenizer.decode([rollout.token_ids[place]]))
        if gap:
            table.add_row(str(i), str(place), token, *(f"{x:.4g}" for x in (*about, *shares)))
    console.print("contributions that differ most:" if titles[1:] else "largest contributions:", table)


def main(argv: Sequence[str]) -> None:
    """The command."""
    own, flags = split(ReplaySettings, argv)
    config = parse(ReplaySettings, own, PROG, positional=True)
    flags = overrides(flags)
    folder, manifest, state = read_record(config.folder, config.step)
    now, other = (parse(GrpoSettings, f, PROG, file=folder / "config.toml") for f in ([], flags))
    threads = config.threads or manifest["environment"]["threads"]
    place = Place.open(dataclasses.replace(now, device=config.device, threads=threads))
    policy, tokenizer = load_policy(folder / "policy", place.device)
    guard = Keeper(now.guard, now.optim.clip)
    learner = Learner(policy, now.optim, now.steps * now.minibatches, guard=guard)
    learner.load_state_dict(state["learner"] | {"policy": policy.state_dict()})
    guard.stepped = learner.weights.stepped
    if wrong := changed(manifest["before"], prints(policy)):
        raise UserError(f"{folder} has other weights than the step began with: {wrong[0]}; record it again")
    reference = policy.frozen() if state["reference"] else None
    if reference is not None:
        reference.load_state_dict(state["reference"])
    settings = [now, other] if flags else [now]
    trainers = [Replay(each, place, learner, guard, reference) for each in settings]
    graded = Round.from_plain(state["round"]).graded
    then, today = manifest["environment"], here()
    differs = {name: [then.get(name), today.get(name)] for name in changed(then, today)}
    if trainers[0].advantages(graded) != state["advantages"]:
        differs["advantages"] = ["as recorded", "the code computes others"]
    updates = repeat(trainers, graded)
    show(updates, ["recorded", " ".join(flags)][: len(trainers)], graded, tokenizer, config.tokens)
    wrong = changed(manifest["after"], prints(policy))
    print(f"other bits in {len(wrong)} tensors, first {wrong[0]}" if wrong else "the same bits as recorded")
    for name, (before, after) in differs.items():
        print(f"  {name}: {before} when it was recorded, now {after}")
    last = updates[-1] if updates else [Found() for _ in trainers]
    values = [{"loss": of.loss, "grad_norm": of.norm, "cosine": of.cosine(last[0])} for of in last]
    result = {"step": manifest["step"], "same_bits": not wrong, **values[-1], "recorded": values[0]}
    print(json.dumps(result | {"differs": differs}))


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names whose values differ."""
    return [name for name in before | after if before.get(name) != after.get(name)]
