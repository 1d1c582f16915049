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
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.policy import Policy
from pipeline.data.pool import Order, fitting, pooled
from pipeline.data.problems import problems
from pipeline.doctor.inject import FaultyEngine
from pipeline.doctor.live import LiveDoctor
from pipeline.environments import open_environment
from pipeline.errors import Stopped, UserError
from pipeline.run.directory import RunDir
from pipeline.run.guard import Diverged, Guard
from pipeline.run.metrics import say
from pipeline.run.rollback import guarded, slowed
from pipeline.run.usage import Usage
from pipeline.run.verifiers import check_sandbox
from pipeline.settings.rollouts import GrpoSettings, RoundSettings
from pipeline.tools.record import recording
from pipeline.train.learner import Learner, PolicyObjective, score
from pipeline.train.losses import loss_named, settings_of
from pipeline.train.memory import check_memory
from pipeline.train.pack import Batch, Per, pack, rollout_weights
from pipeline.train.place import Place
from pipeline.train.policy import load_policy, loading, open_rollouts, save_policy
from pipeline.train.rollouts import (
    Watch,
    batch_advantages,
    check_routes,
    example,
    mean,
    rollout_metrics,
    transcript,
)
from pipeline.train.supervised import load_state, save_state
from rewards.reward import Scorer
from rollout.checkpoint import eos_ids
from rollout.collect import Plan, RolloutSource, Round, sample_groups
from rollout.engine import EngineDied, StaleWeights, Unanswerable
from rollout.text.tokenizer import completion_text, make_prompt
from rollout.turns.engine import TurnEngine
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
        flat_again: float = 1.0,
        router_replay: bool = False,
        mtp_coef: float = 0.0,
    ) -> None:
        """`reference`: a frozen copy of the policy scores the rollouts too, or the model of a directory.
        Raises `UserError` for a model, engine or problem source that cannot be used."""
        self.config, self.run_dir, self.place = config, run_dir, Place.open(config)
        start = run_dir.model_input(config.init_from)
        tokens = min(self.place.micro_tokens(config), config.group_size * config.max_tokens)
        rollout = replace(config.rollout, routed_experts=True) if router_replay else config.rollout
        sizes, depth = (start, self.place, config.optim, tokens), config.staleness // config.minibatches
        check_memory(*sizes, reference=reference, rollout=rollout, depth=depth)
        self.policy, self.tokenizer = load_policy(start, self.place.device)
        with loading(start):
            self.eos = eos_ids(start, self.tokenizer.eos_token_id)
        self.problems = pooled(config, self.tokenizer, start, config.seed, run_dir)
        self.heldout_problems = []
        if config.eval_every:
            count = config.eval_problems
            heldout = problems(config.eval_source, count=count, seed=1, data_dir=config.data, rows=config)
            self.heldout_problems = fitting(heldout, config, self.tokenizer, start)
        engine = open_rollouts(self.policy, self.tokenizer, rollout, start, config.optim.precision)
        unsafe = config.allow_unsafe_code
        self.scorer = Scorer(rewards, overlong_buffer=overlong_buffer, allow_unsafe_code=unsafe)
        check_sandbox(run_dir.stage.name, self.scorer.pool, [*self.problems, *self.heldout_problems], unsafe)
        run_dir.metrics.explain(self.scorer.glossary())
        ids, shuffled = [problem.id for problem in self.problems], config.order == "shuffled"
        self.order = Order(ids, config.seed, shuffled=shuffled, again=flat_again)
        self.source = RolloutSource(engine, self.prompts, self.seen, plan)
        guard = Guard(config.guard, config.optim.clip, era=run_dir.era)
        optim, updates = slowed(config.optim, run_dir), config.steps * config.minibatches
        self.learner = Learner(self.policy, optim, updates, guard=guard)
        self.policy.router_replay = router_replay
        if mtp_coef:
            self.learner.train_drafts(mtp_coef)
        self.reference = self.policy.frozen() if reference is True else None
        self.watch = Watch(run_dir, config.max_error_share, max_idle_steps)
        self.usage = Usage(self.policy.config, self.place.device)
        self.tokens = {"sampled": 0, "trained": 0}  # so far: of completions; of prompts and completions

    # ---- one step

    @abstractmethod
    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `step` (from 1): its metrics, and transcripts for samples.jsonl."""

    def round(self, step: int) -> tuple[Round, dict[str, float]]:
        """The rollouts of step `step`, and the metrics of their sampling; where asked for, later ones are
        sampled from now on."""
        config, version = self.config, self.learner.updates
        last = min(step + config.staleness // config.minibatches, config.steps)
        done = self.source.next(self.policy, version, *map(self.sampling, range(step, last + 1)))
        check_routes(self.policy, (g.rollout for g in done.graded), self.policy.router_replay)
        self.tokens["sampled"] += done.tokens
        metrics = rollout_metrics(done.graded) | done.engine
        metrics |= {"time/tokens_per_s": done.tokens / done.sample_s, "data/sampled": self.tokens["sampled"]}
        metrics |= {"time/rollout_s": done.sample_s, "time/reward_s": done.grade_s}
        if config.staleness:
            ages = [version - began for began in done.versions()]
            metrics |= {"rollout/staleness": mean(ages), "rollout/staleness_max": max(ages)}
            renewed = [g.rollout.last_version > g.rollout.policy_version for g in done.graded]
            metrics |= {"rollout/renewed": mean(renewed), "time/wait_s": done.wait_s}
        if not self.source.in_place:
            metrics |= {"time/sync_s": done.sync_s, "rollout/version": max(done.versions())}
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
        return [transcript(g, a, self.tokenizer) for g, a in pairs]

    def sampling(self, step: int) -> SamplingParams:
        """How the completions of step `step` are sampled."""
        return self.config.params(n=self.config.group_size, seed=self.config.seed * 1_000_003 + step)

    def prompts(self, place: int, count: int) -> list[Prompt]:
        """`count` problems from index `place` of their endless order on."""
        picked = [self.problems[self.order.at(at)] for at in range(place, place + count)]
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
            stale = self.config.staleness
            why = f"rollouts are up to {stale} updates old (staleness)" if stale else ""
            why = cause or why or "the rollouts do not come from these weights"
            remedy = "lower staleness or the rate" if stale else "update or change the engine"
            advice = f"{remedy}, or raise the bound. {self.run_dir.kept()}"
            raise Stopped(f"engine and trainer differ by {bound}: {why} (max_mismatch_kl); {advice}")

    def seen(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """`grade`, of rollouts to train on: what they say of their problems sets the next epochs' order."""
        graded = self.grade(rollouts)
        self.order.saw(graded)
        return graded

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
        state |= {"order": self.order.state_dict()}
        save_state(self.run_dir, step, state, applied)

    def restore(self) -> int:
        """Go on from the newest checkpoint; the steps it stands for."""
        step, state = load_state(self.run_dir)
        if step:
            self.learner.load_state_dict(state["learner"])
            self.source.load_state_dict(state)
            self.watch.load_state_dict(state["watch"])
            self.tokens = state.get("tokens", self.tokens)  # not in those of earlier versions
            self.order.load_state_dict(state.get("order", self.order.state_dict()))
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
        self.aim(config)
        plan = Plan(config.prompts_per_step, config.group_size, config.dynamic_sampling, config.most_requests)
        names = ("overlong_buffer", "max_idle_steps", "flat_again", "router_replay", "mtp_coef")
        own: dict[str, Any] = {name: getattr(config, name) for name in names}
        super().__init__(config, run_dir, plan, config.rewards, bool(config.kl_coef), **own)
        ends = frozenset() if config.environment else self.eos  # an environment ends rollouts anywhere
        self.doctor = LiveDoctor(ends, config.staleness > 0)
        if config.environment:
            pool, unsafe = self.scorer.pool, config.allow_unsafe_code
            check_sandbox(run_dir.stage.name, pool, (), unsafe, tool=config.environment == "python")
            turns = open_environment(config.environment, pool), self.tokenizer, self.eos, config.max_turns
            self.source.engine = TurnEngine(self.source.engine, *turns)
        if config.inject:
            self.source.engine = FaultyEngine(self.source.engine, config.inject)
            say(f"{run_dir.stage.name}: inject = {config.inject}: THIS RUN IS FAULTY ON PURPOSE")

    def aim(self, config: GrpoSettings) -> None:
        """Take the objective of `config`. Raises `UserError`: a loss that cannot be used."""
        try:
            self.loss = loss_named(config.loss)
            settings = settings_of(self.loss, config)
        except ValueError as error:
            raise UserError(str(error)) from error
        how = config.temperature, config.correction, config.entropy_coef
        self.objective = PolicyObjective(self.loss, settings, *how)
        self.scores_old = config.correction.anchor == "old"

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `step` (from 1): its metrics, and transcripts for samples.jsonl."""
        config = self.config
        done, sampling = self.round(step)
        graded = done.graded
        advantages = self.advantages(graded)
        batches = self.batches(graded, advantages)
        due = step in config.record or (config.record_every and step % config.record_every == 0)
        state = dict[str, Any]()
        if due:
            reference = None if self.reference is None else self.reference.state_dict()
            state = {"round": done.plain(), "advantages": advantages, "reference": reference}
        found = self.doctor.rollouts(step, graded)
        with recording(self.run_dir, config, step, self.learner, self.tokenizer, state):
            began = time.monotonic()
            metrics = self.update(batches) | found
            seconds = time.monotonic() - began
        scorings = (self.reference is not None) + (self.scores_old and len(batches) > 1)
        metrics |= self.cost(batches, seconds, scorings) | sampling
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
        size = self.config.group_size
        groups = [rewards[start : start + size] for start in range(0, len(graded), size)]
        return batch_advantages(groups, self.config.advantage_scale)

    def batches(self, graded: Sequence[Graded], advantages: Sequence[float | None]) -> list[Batch]:
        """Packed rollouts, a batch a minibatch of groups; it is empty where no rollout counts.

        A rollout without advantage changes nothing unless there is a KL penalty or an entropy bonus, and is
        left out of the forward; it still counts in the denominator of the loss. One that the verifier failed
        on, or that the overlong filter leaves out, does not: the loss is a mean over the others.
        """
        config = self.config
        always, cut = config.kl_coef or config.entropy_coef, "length" if config.overlong_filter else None
        share = len(graded) // config.minibatches
        per: Per = getattr(self.loss, "per", "rollout")
        out = []
        for start in range(0, len(graded), share):
            both = zip(graded[start : start + share], advantages[start : start + share], strict=True)
            pairs = [(g.rollout, a) for g, a in both if a is not None and g.rollout.finish_reason != cut]
            weights = rollout_weights([r.sampled for r, _ in pairs], per, config.max_tokens)
            trained = ((r, a, w) for (r, a), w in zip(pairs, weights, strict=True) if a or always)
            examples = [example(*of, share=config.share_prompts) for of in trained]
            out.append(pack(examples, self.place.micro_tokens(config)))
        return out

    def old_logprobs(self, batches: Sequence[Batch]) -> list[list[Tensor] | None]:
        """Those of several batches, whose later updates move away from the policy that sampled."""
        if not self.scores_old or sum(bool(batch.parts) for batch in batches) < 2:
            return [None] * len(batches)
        parts = [b.micro_batches(self.place.device) for b in batches]
        heat = self.config.temperature
        return [[score(self.policy, part, heat, part.routed_experts) for part in of] for of in parts]

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update a batch, none of an empty one; the metrics of the last, and the worst mismatch between
        engine and trainer. Raises `Stopped`: as `check_mismatch`."""
        config = self.config
        metrics, measured, mismatch = dict[str, float](), dict[str, float](), 0.0
        for batch, logprobs in zip(batches, self.old_logprobs(batches), strict=True):
            if not batch.parts:
                continue
            metrics = self.learner.policy_update(batch, self.objective, logprobs, self.reference)
            found = {key: metrics.pop(key) for key in [*metrics] if "mismatch" in key}  # none if skipped
            if self.scores_old or not measured:  # else it compares the engine with a policy that has moved on
                mismatch = max(mismatch, found.get("policy/mismatch_kl", 0.0))
                measured = found | self.doctor.gaps(mismatch, self.learner.scored)
        metrics |= measured
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
