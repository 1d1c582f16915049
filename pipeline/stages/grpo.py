"""Stages `zero`, `grpo`, `grpo2` and those of students: RL with group-relative advantages.

R1-Zero starts from the base with accuracy and format alone; the first RL stage of R1 starts from the cold
start and adds the language reward; the second covers all scenarios. `student_rl` and `distill_rl` do the same
to small dense students (Sec. 4.1). `Trainer.step` is DeepSeekMath's Algorithm 1:

    a batch of questions; G outputs of each, sampled from the policy       lines 5 to 7   round
    a reward for each output                                               line 8         grade
    its advantage over the other outputs of its group                      line 9         advantages
    updates that maximize the GRPO objective                               lines 10, 11   batches, update
    every `ref_refresh_steps` the reference becomes the policy             line 3

`RoundTrainer` and `train_rounds` hold what has nothing to do with GRPO: on-policy distillation, which learns
from rounds of samples too, has them in common (`distill.on_policy`).

Papers  GRPO  arXiv:2402.03300 Sec. 4.1; R1 arXiv:2501.12948 Sec. 2.2, 2.3.2, 2.3.4; DAPO arXiv:2503.14476
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.policy import Policy
from pipeline.data.pool import fitting, pooled
from pipeline.data.problems import order, problems
from pipeline.doctor.inject import FaultyEngine
from pipeline.doctor.live import LiveDoctor
from pipeline.errors import Stopped, UserError
from pipeline.run.directory import RunDir
from pipeline.run.guard import Diverged, Guard
from pipeline.run.metrics import say
from pipeline.run.rollback import guarded, slowed
from pipeline.run.usage import Usage
from pipeline.run.verifiers import check_sandbox
from pipeline.settings.rollouts import GrpoSettings, RoundSettings
from pipeline.train.advantages import group_advantages
from pipeline.train.learner import Learner, PolicyObjective, score
from pipeline.train.losses import loss_named, takes_settings
from pipeline.train.memory import check_memory
from pipeline.train.pack import Batch, Per, pack, rollout_weights
from pipeline.train.place import Place
from pipeline.train.policy import load_policy, open_rollouts, save_policy
from pipeline.train.rollouts import Watch, example, mean, rollout_metrics, transcript
from pipeline.train.supervised import load_state, save_state
from rewards.reward import Scorer
from rollout.checkpoint import eos_of
from rollout.collect import Plan, RolloutSource, Round, sample_groups
from rollout.engine import EngineDied, StaleWeights, Unanswerable
from rollout.text.tokenizer import completion_text, make_prompt
from rollout.types import Graded, Prompt, Rollout, SamplingParams


def run(config: GrpoSettings, run_dir: RunDir) -> None:
    """Train; leave `model/`."""
    train_rounds(config, run_dir, lambda: Trainer(config, run_dir))


class RoundTrainer(ABC):
    """Policy, source of rollouts, rewards and learner of one stage."""

    def __init__(
        self,
        config: RoundSettings,
        run_dir: RunDir,
        plan: Plan,
        rewards: Mapping[str, float],
        reference: bool | Path,
        *,
        overlong_buffer: int = 0,
        max_idle_steps: int = 0,
    ) -> None:
        """`reference`: a frozen copy of the policy scores the rollouts too, or the model of a directory.
        Raises `UserError` for a model, engine or problem source that cannot be used."""
        self.config, self.run_dir, self.place = config, run_dir, Place.open(config)
        start = run_dir.model_input(config.init_from)
        tokens = min(self.place.micro_tokens(config), config.group_size * config.max_tokens)
        check_memory(start, self.place, config.optim, tokens, reference=reference, rollout=config.rollout)
        self.policy, self.tokenizer = load_policy(start, self.place.device)
        eos = eos_of(start, self.tokenizer.eos_token_id)
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or ())
        self.problems = pooled(config, self.tokenizer, start, config.seed)
        run_dir.record_rows(f"the problems of {', '.join(config.problems)}", self.problems)
        self.heldout_problems = []
        if config.eval_every:
            count = config.eval_problems
            heldout = problems(config.eval_source, count=count, seed=1, data_dir=config.data, rows=config)
            self.heldout_problems = fitting(heldout, config, self.tokenizer, start)
        engine = open_rollouts(self.policy, self.tokenizer, config.rollout, start, config.optim.precision)
        unsafe = config.allow_unsafe_code
        self.scorer = Scorer(rewards, overlong_buffer=overlong_buffer, allow_unsafe_code=unsafe)
        check_sandbox(run_dir.stage.name, self.scorer.pool, [*self.problems, *self.heldout_problems], unsafe)
        run_dir.metrics.explain(self.scorer.glossary())
        self.source = RolloutSource(engine, self.prompts, self.grade, plan)
        guard = Guard(config.guard, config.optim.clip, era=run_dir.era)
        optim, updates = slowed(config.optim, run_dir), config.steps * config.minibatches
        self.learner = Learner(self.policy, optim, updates, guard=guard)
        self.reference = self.policy.frozen() if reference is True else None
        self.watch = Watch(run_dir, config.max_error_share, max_idle_steps)
        self.usage = Usage(self.policy.config, self.place.device)
        self.tokens = {"sampled": 0, "trained": 0}  # so far: of completions; of prompts and completions

    # ---- one step

    @abstractmethod
    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `step` (from 1): its metrics, and transcripts for samples.jsonl."""

    def round(self, step: int) -> tuple[Round, dict[str, float]]:
        """The rollouts of step `step`, and the metrics of their sampling; where asked for, the next ones are
        sampled from now on."""
        config, version = self.config, self.learner.updates
        ahead = self.sampling(step + 1) if config.overlap and step < config.steps else None
        done = self.source.next(self.policy, version, self.sampling(step), ahead)
        self.tokens["sampled"] += done.tokens
        metrics = rollout_metrics(done.graded) | done.engine
        metrics |= {"time/tokens_per_s": done.tokens / done.sample_s, "data/sampled": self.tokens["sampled"]}
        metrics |= {"time/rollout_s": done.sample_s, "time/reward_s": done.grade_s}
        if config.overlap:
            metrics |= {"rollout/staleness": version - done.versions()[0], "time/wait_s": done.wait_s}
        if not self.source.in_place:
            metrics |= {"time/sync_s": done.sync_s, "rollout/version": done.versions()[1]}
        return done, metrics

    def cost(self, batches: Sequence[Batch], seconds: float, scorings: int) -> dict[str, float]:
        """The metrics of updates on `batches` that took `seconds`; `scorings` as for `Usage.of`."""
        lengths = [n for batch in batches for n in batch.lengths]
        self.tokens["trained"] += sum(lengths)
        used = self.usage.of(lengths, seconds, scorings)
        return used | {"time/train_s": seconds, "data/tokens": self.tokens["trained"]}

    def shown(self, graded: Sequence[Graded], advantages: Sequence[float | None]) -> list[dict[str, Any]]:
        """Transcripts of a step: `log_samples` rollouts, evenly spaced."""
        most = self.config.log_samples
        stride = max(1, len(graded) // max(1, most))
        pairs = zip(graded[::stride], advantages[::stride], strict=True) if most else ()
        return [transcript(g, a) for g, a in pairs]

    def sampling(self, step: int) -> SamplingParams:
        """How the completions of step `step` are sampled."""
        return self.config.params(n=self.config.group_size, seed=self.config.seed * 1_000_003 + step)

    def prompts(self, place: int, count: int) -> list[Prompt]:
        """`count` problems from index `place` on: each once an epoch, in an order set by seed and epoch."""
        n, places = len(self.problems), range(place, place + count)
        orders = {epoch: order(n, self.config.seed, epoch) for epoch in {at // n for at in places}}
        picked = [self.problems[orders[at // n][at % n]] for at in places]
        return [make_prompt(self.tokenizer, p, self.config.template) for p in picked]

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """Every rollout with its rewards."""
        texts = [completion_text(self.tokenizer, r, r.prompt.template) for r in rollouts]
        return self.scorer.grade_all(zip(rollouts, texts, strict=True))

    def check_mismatch(self, mismatch: float, cause: str = "") -> None:
        """Raise `Stopped` where the KL between engine and trainer, nats a token, exceeds its bound: the
        engine sampled from other weights than the policy's, or what else its `cause` is."""
        if mismatch > self.config.max_mismatch_kl:
            bound = f"{mismatch:.3g} nats a token (bound {self.config.max_mismatch_kl})"
            why = cause or "the rollouts do not come from these weights"
            advice = f"update or change the engine, or raise the bound. {self.run_dir.kept()}"
            raise Stopped(f"engine and trainer differ by {bound}: {why} (max_mismatch_kl); {advice}")

    # ---- around it

    def heldout(self) -> dict[str, float]:
        """Greedy accuracy on a slice of the held-out problems."""
        self.source.settle()  # one request at a time
        self.source.sync(self.policy, self.learner.updates)
        prompts = [make_prompt(self.tokenizer, p, self.config.template) for p in self.heldout_problems]
        greedy = SamplingParams(max_tokens=self.config.max_tokens, temperature=0.0)
        graded = self.grade(sample_groups(self.source.engine, prompts, greedy))
        return {
            "heldout/pass@1": mean([float(g.parts.get("accuracy") == 1) for g in graded]),
            "heldout/tokens_mean": mean([len(g.rollout.token_ids) for g in graded]),
            "heldout/format": mean([g.parts["format"] for g in graded]),
        }

    def checkpoint(self, step: int, applied: int | None = None) -> None:
        """Save all that the next step depends on; `applied` as for `RunDir.checkpoint`."""
        reference = None if self.reference is None else self.reference.state_dict()
        state = {"learner": self.learner.state_dict(), "reference": reference, **self.source.state_dict()}
        state |= {"watch": self.watch.state_dict(), "tokens": self.tokens}
        save_state(self.run_dir, step, state, applied)

    def restore(self) -> int:
        """Go on from the newest checkpoint; the steps it stands for."""
        step, state = load_state(self.run_dir)
        if step:
            self.learner.load_state_dict(state["learner"])
            self.source.load_state_dict(state)
            self.watch.load_state_dict(state["watch"])
            self.tokens = state.get("tokens", self.tokens)  # not in those of earlier versions
        if step and self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        return step

    def close(self) -> None:
        """Stop engine and graders."""
        self.source.close()
        self.scorer.close()


class Trainer(RoundTrainer):
    """How a step of RL moves the policy."""

    config: GrpoSettings

    def __init__(self, config: GrpoSettings, run_dir: RunDir) -> None:
        """Raises `UserError`, for the loss too."""
        try:
            self.loss = loss_named(config.loss)
        except ValueError as error:
            raise UserError(str(error)) from error
        plan = Plan(config.prompts_per_step, config.group_size, config.dynamic_sampling, config.most_requests)
        limits = {"overlong_buffer": config.overlong_buffer, "max_idle_steps": config.max_idle_steps}
        super().__init__(config, run_dir, plan, config.rewards, bool(config.kl_coef), **limits)
        self.doctor = LiveDoctor(self.eos, config.overlap)
        if config.inject:
            self.source.engine = FaultyEngine(self.source.engine, config.inject)
            say(f"{run_dir.stage.name}: inject = {config.inject}: THIS RUN IS FAULTY ON PURPOSE")
        settings = {name: getattr(config, name) for name in takes_settings(self.loss, config.loss)}
        self.objective = PolicyObjective(self.loss, settings, config.temperature, config.tis_cap)

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `step` (from 1): its metrics, and transcripts for samples.jsonl."""
        config = self.config
        done, sampling = self.round(step)
        began, graded = time.monotonic(), done.graded
        advantages = self.advantages(graded)
        batches = self.batches(graded, advantages)
        found = self.doctor.rollouts(step, graded)
        metrics = self.update(batches) | found
        scorings = (self.reference is not None) + (len(batches) > 1)
        metrics |= self.cost(batches, time.monotonic() - began, scorings) | sampling
        if config.ref_refresh_steps and step % config.ref_refresh_steps == 0 and self.reference is not None:
            self.reference = self.policy.frozen()
        groups = [advantages[i : i + config.group_size] for i in range(0, len(graded), config.group_size)]
        metrics["reward/groups_with_spread"] = mean([float(any(group)) for group in groups])
        self.watch.look(step, graded, metrics["reward/groups_with_spread"])
        if config.dynamic_sampling:
            metrics["rollout/groups_sampled"] = done.sampled
        return metrics, self.shown(graded, advantages)

    def advantages(self, graded: Sequence[Graded]) -> list[float | None]:
        """Each rollout's advantage over its group; None where its verifier failed."""
        rewards = [None if g.verdict == "error" else g.reward for g in graded]
        size, scale = self.config.group_size, self.config.advantage_scale
        groups = (rewards[start : start + size] for start in range(0, len(graded), size))
        return [advantage for group in groups for advantage in group_advantages(group, scale)]

    def batches(self, graded: Sequence[Graded], advantages: Sequence[float | None]) -> list[Batch]:
        """Packed rollouts, a batch a minibatch of groups; a minibatch in which no rollout counts has none.

        A rollout without advantage changes nothing unless there is a KL penalty, and is left out of the
        forward; it still counts in the denominator of the loss.
        """
        config = self.config
        share = len(graded) // config.minibatches
        per: Per = getattr(self.loss, "per", "rollout")
        out = []
        for start in range(0, len(graded), share):
            both = zip(graded[start : start + share], advantages[start : start + share], strict=True)
            pairs = [(g.rollout, a) for g, a in both if a is not None]
            weights = rollout_weights([len(r.token_ids) for r, _ in pairs], per, config.max_tokens)
            trained = ((r, a, w) for (r, a), w in zip(pairs, weights, strict=True) if a or config.kl_coef)
            if examples := [example(*of) for of in trained]:
                out.append(pack(examples, self.place.micro_tokens(config)))
        return out

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update a batch; the metrics of the last, and the worst mismatch between engine and trainer.
        Raises `Stopped`: as `check_mismatch`."""
        config = self.config
        old: list[list[Tensor] | None] = [None] * len(batches)
        if len(batches) > 1:  # later updates move away from the policy that sampled
            parts = [b.micro_batches(self.place.device) for b in batches]
            old = [[score(self.policy, part, config.temperature) for part in of] for of in parts]
        metrics, mismatch = dict[str, float](), 0.0
        for batch, logprobs in zip(batches, old, strict=True):
            metrics = self.learner.policy_update(batch, self.objective, logprobs, self.reference)
            mismatch = max(mismatch, metrics.get("policy/mismatch_kl", 0.0))  # none of a skipped update
            metrics |= self.doctor.gaps(mismatch, self.learner.scored)
        if ":" in config.loss:  # ours stand in the glossary; a missing line there is a defect
            self.run_dir.metrics.explain(dict.fromkeys(metrics, f"a metric of the loss {config.loss}"))
        if mismatch > config.max_mismatch_kl:  # the step that stops a run shows why, to `doctor` too
            self.run_dir.log(self.doctor.step, config.steps, metrics)
        self.check_mismatch(mismatch, self.doctor.cause)
        return metrics


def train_rounds(config: RoundSettings, run_dir: RunDir, make: Callable[[], RoundTrainer]) -> None:
    """Every step of the trainer that `make` opens, from the newest checkpoint on; leaves `model/`."""

    def attempt() -> tuple[Policy, PreTrainedTokenizerFast, dict[str, int]]:
        trainer = make()
        guard = trainer.learner.guard
        try:
            first = trainer.restore() + 1
            run_dir.metrics.begin()
            for step in range(first, config.steps + 1):
                began = time.monotonic()
                metrics, records = trainer.step(step)
                if config.eval_every and (step % config.eval_every == 0 or step == 1):
                    metrics |= trainer.heldout()
                metrics["time/step_s"] = time.monotonic() - began
                run_dir.samples(step, records)
                run_dir.log(step, config.steps, metrics)
                trainer.watch.check()
                if step % config.checkpoint_every == 0 and step < config.steps:
                    trainer.checkpoint(step, guard.applied)
                run_dir.stop_if_interrupted(lambda at=step: trainer.checkpoint(at))  # type: ignore[misc]
        except (EngineDied, StaleWeights, Unanswerable) as error:
            raise UserError(
                f"{error} To go on from the last checkpoint: {run_dir.command} --resume"
            ) from error
        except FloatingPointError as error:  # the engine's: finite weights that give logits that are not
            raise Diverged(str(error), guard.applied + guard.skipped, guard.applied) from error
        finally:
            trainer.close()
        guard.check_trained(run_dir.stage.name)
        return trainer.policy, trainer.tokenizer, trainer.tokens

    policy, tokenizer, tokens = guarded(run_dir, config.guard, attempt)
    about = config.template, config.title
    run_dir.save_model(lambda path: save_policy(policy, tokenizer, path, *about, tokens=tokens))
