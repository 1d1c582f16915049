"""Stage `on_policy`: the student samples, the teacher scores every token, the student moves towards it.

    a batch of questions; outputs of each, sampled from the student        round
    the teacher's next-token distribution at each of their tokens          terms
    updates that minimize the divergence from it, a mean over the tokens   batches, update

The student learns where its own samples take it, with a signal for every token, while SFT on traces shows it
states that a better model reached. No reward is needed; accuracy and format are only logged.

Papers  GKD    arXiv:2306.13649  Sec. 3 (with all data from the student: lambda = 1)
        Qwen3  arXiv:2505.09388  Sec. 4.5 (its small models)
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.divergence import Divergence, weighted_divergence
from pipeline.data.pool import fitting
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.settings.rollouts import OnPolicySettings
from pipeline.stages.grpo import RoundTrainer, train_rounds
from pipeline.train.learner import sampling_metrics
from pipeline.train.losses import Terms
from pipeline.train.pack import Batch, Micro, pack, rollout_weights
from pipeline.train.place import device_named
from pipeline.train.policy import loading
from pipeline.train.rollouts import example
from rollout import local
from rollout.collect import Plan
from rollout.text.tokenizer import load_tokenizer
from rollout.types import Graded
from rollout.weights import DTYPES

REWARDS = {"accuracy": 1.0, "format": 1.0}
"""What is logged of the samples."""


def run(config: OnPolicySettings, run_dir: RunDir) -> None:
    """Train the student; leave `model/`."""
    train_rounds(config, run_dir, lambda: Student(config, run_dir))


class Student(RoundTrainer):
    """A student, its teacher, and how a step moves the one towards the other."""

    config: OnPolicySettings

    def __init__(self, config: OnPolicySettings, run_dir: RunDir) -> None:
        """Raises `UserError`, for a teacher of another vocabulary too."""
        device_named(config.device)  # refuse it before a model is opened
        start, path = run_dir.model_input(config.init_from), run_dir.model_input(config.teacher)
        with loading(start):
            own = load_tokenizer(start)
        with loading(path):
            check_vocabulary(own, load_tokenizer(path), path)  # before anything is opened
        plan = Plan(config.prompts_per_step, config.group_size)
        super().__init__(config, run_dir, plan, REWARDS, path)
        dtype = DTYPES["float32" if config.optim.precision == "float32" else "bfloat16"]
        with loading(path):
            teacher = local.load_policy(path, dtype, self.place.device)
        self.problems = fitting(self.problems, config, self.tokenizer, path)
        self.teacher = teacher.eval().requires_grad_(False)
        rows, most = len(self.policy.head.weight), len(self.teacher.head.weight)
        if rows > most:
            raise UserError(
                f"the teacher at {path} has only {most} token ids, the student {rows}; take another"
            )
        self.divergence = Divergence(config.divergence, config.beta, config.temperature)

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `step` (from 1): its metrics, and transcripts for samples.jsonl."""
        done, sampling = self.round(step)
        began, batches = time.monotonic(), self.batches(done.graded)
        metrics = self.update(batches)
        metrics |= self.cost(batches, time.monotonic() - began, scorings=0) | sampling
        self.watch.look(step, done.graded)
        return metrics, self.shown(done.graded, [None] * len(done.graded))

    def batches(self, graded: Sequence[Graded]) -> list[Batch]:
        """Packed rollouts, a batch a minibatch of groups; every completion token of one counts the same."""
        share, out = len(graded) // self.config.minibatches, []
        for start in range(0, len(graded), share):
            rollouts = [g.rollout for g in graded[start : start + share]]
            weights = rollout_weights([len(r.token_ids) for r in rollouts], "token", self.config.max_tokens)
            common = self.config.share_prompts
            examples = [example(r, 0.0, w, common) for r, w in zip(rollouts, weights, strict=True)]
            out.append(pack(examples, self.place.micro_tokens(self.config)))
        return out

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update a batch; the metrics of the first, whose samples are the current student's own, and
        what the optimizer reports of the last. Raises `Stopped`: as `check_mismatch`."""
        found = [self.learner.update(batch, partial(self.terms, batch.scored)) for batch in batches]
        self.check_mismatch(found[0].get("policy/mismatch_kl", 0.0))
        return found[0] | {name: value for name, value in found[-1].items() if name.startswith("optim/")}

    def terms(self, scored: int, part: Micro) -> Terms:
        """Loss and metrics of a micro-batch of an update on `scored` tokens."""
        states, targets, weights = part.ahead(1)
        with torch.no_grad():
            taught = self.teacher.hidden(part.token_ids, part.packed)[0, states]
        heads = self.learner.states(part), self.policy.head, taught, self.teacher.head
        loss, logprobs, entropy = weighted_divergence(self.divergence, *heads, targets, weights)
        return loss, {"loss/divergence": loss.detach()} | sampling_metrics(part, logprobs, entropy, scored)


def check_vocabulary(student: Any, teacher: Any, path: Path) -> None:
    """Raise `UserError` unless every token of the student's tokenizer has the same id in the teacher's."""
    ids = teacher.get_vocab()
    for token, number in sorted(student.get_vocab().items(), key=lambda pair: pair[1]):
        if ids.get(token) != number:
            what = (
                f"token {token!r} is {number} for the student and {ids.get(token, 'unknown')} for the teacher"
            )
            way = "take a teacher of the student's family, or distill its samples: make distill"
            raise UserError(f"the teacher at {path} has another tokenizer: {what}; {way}")
