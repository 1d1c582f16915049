"""The RL step: rollouts -> rewards -> advantages -> packed rows -> updates. Settings: `grpo`."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch

from model.policy import Policy
from pipeline.data.problems import order, problems
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.settings.grpo import GrpoSettings
from pipeline.stages.grpo import mean
from pipeline.train.advantages import group_advantages
from pipeline.train.learner import Learner, PolicyObjective, score
from pipeline.train.pack import Example, pack, rollout_weights
from pipeline.train.policy import load_policy, set_up
from rewards.reward import Scorer
from rollout.collect import Collector, Plan, Round, sample_groups
from rollout.engine import EngineDied, RolloutEngine, StaleWeights
from rollout.open import engine_for
from rollout.text.tokenizer import completion_text, make_prompt
from rollout.types import Graded, Problem, Prompt, Rollout, SamplingParams


class Trainer:
    """Policy, engine, scorer and learner of one RL stage."""

    def __init__(self, config: GrpoSettings, run_dir: RunDir) -> None:
        set_up(config.seed, config.threads)
        self.config, self.run_dir = config, run_dir
        start = run_dir.model_input(config.init_from)
        self.policy, self.tokenizer = load_policy(start)
        try:
            self.engine: RolloutEngine = engine_for(self.policy, self.tokenizer, config.rollout, start)
        except (ModuleNotFoundError, ValueError, EngineDied, StaleWeights) as error:
            raise UserError(str(error)) from error
        self.scorer = Scorer(config.rewards, overlong_buffer=config.overlong_buffer)
        run_dir.metrics.explain(self.scorer.glossary())
        self.synced = 0  # updates that the engine's weights have had
        self.cursor = 0  # problems used up
        plan = Plan(config.prompts_per_step, config.group_size, config.dynamic_sampling, config.most_requests)
        self.collector = Collector(self.engine, self.prompts, self.grade, plan)
        self.problems: list[Problem] = []
        for source in config.problems:
            self.problems += problems(
                source, count=config.pool, split="train", seed=config.seed, data_dir=config.data
            )
        self.heldout_problems: list[Problem] = []
        if config.eval_every:
            self.heldout_problems = problems(
                config.eval_source, count=config.eval_problems, split="heldout", seed=1, data_dir=config.data
            )
        updates = config.steps * config.minibatches
        self.learner = Learner(self.policy, config.optim, updates, micro_rows=config.micro_rows)
        self.reference = frozen(self.policy) if config.kl_coef else None
        self.objective = PolicyObjective(
            config.clip_low, config.clip_high, config.kl_coef, config.temperature, config.tis_cap
        )

    # ---- one step

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `step` (from 1): its metrics, and transcripts for samples.jsonl."""
        config = self.config
        began = time.monotonic()
        done = self.collector.take()
        if done is None:
            self.sync()
            synced = time.monotonic()
            done = self.collector.collect(self.cursor, self.sampling(step))
        else:
            synced = began
        waited = time.monotonic() - synced
        self.cursor = done.cursor
        if config.overlap and step < config.steps:
            self.sync(apart=True)
            self.collector.begin(self.cursor, self.sampling(step + 1))
        trained = time.monotonic()
        graded = done.graded
        advantages: list[float | None] = []
        for start in range(0, len(graded), config.group_size):
            group = graded[start : start + config.group_size]
            rewards = [None if g.verdict == "error" else g.reward for g in group]
            advantages += group_advantages(rewards, config.advantage_scale)
        version = self.learner.updates
        metrics = self.update(graded, advantages)
        if config.ref_refresh_steps and step % config.ref_refresh_steps == 0 and self.reference is not None:
            self.reference = frozen(self.policy)
        metrics |= rollout_metrics(graded, advantages, config.group_size)
        metrics |= done.engine
        metrics["time/tokens_per_s"] = done.tokens / done.sample_s
        metrics["time/rollout_s"], metrics["time/reward_s"] = done.sample_s, done.grade_s
        metrics["time/train_s"] = time.monotonic() - trained
        if config.dynamic_sampling:
            metrics["rollout/groups_sampled"] = done.sampled
        if config.overlap:
            metrics |= {"rollout/staleness": version - done.versions()[0], "time/wait_s": waited}
        if not self.in_place:
            metrics |= {"time/sync_s": synced - began, "rollout/version": done.versions()[1]}
        stride = max(1, len(graded) // max(1, config.log_samples))
        shown = zip(graded[::stride], advantages[::stride], strict=True) if config.log_samples else ()
        return metrics, [record(g, a) for g, a in shown]

    def sampling(self, step: int) -> SamplingParams:
        """How the completions of step `step` are drawn."""
        return SamplingParams(
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            n=self.config.group_size,
            seed=self.config.seed * 1_000_003 + step,
        )

    def prompts(self, place: int, count: int) -> list[Prompt]:
        """Problems from a place on: each once an epoch, in an order that seed and epoch alone decide."""
        n, places = len(self.problems), range(place, place + count)
        orders = {epoch: order(n, self.config.seed, epoch) for epoch in {at // n for at in places}}
        picked = [self.problems[orders[at // n][at % n]] for at in places]
        return [make_prompt(self.tokenizer, p, self.config.template) for p in picked]

    @property
    def in_place(self) -> bool:
        """Whether the engine draws from the trainer's own tensors."""
        return self.config.rollout.engine != "vllm" and not self.config.rollout.workers

    def sync(self, apart: bool = False) -> None:
        """Have the engine draw from the policy as it is now. `apart`: and not follow its next update."""
        if self.in_place:
            self.engine.load_weights(frozen(self.policy) if apart else self.policy, self.learner.updates)
        elif self.synced != self.learner.updates:
            self.engine.load_weights(self.policy, self.learner.updates)
        self.synced = self.learner.updates

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """Grade every rollout by rule."""
        texts = [completion_text(self.tokenizer, r, r.prompt.template) for r in rollouts]
        return self.scorer.grade_all(zip(rollouts, texts, strict=True))

    def update(self, graded: Sequence[Graded], advantages: Sequence[float | None]) -> dict[str, float]:
        """One update a minibatch of groups; the metrics of the last, engine mismatch the worst of all.

        A rollout without advantage teaches nothing unless there is a KL penalty, and is left out of the
        forward; it still counts in the denominator of the loss.
        """
        config = self.config
        share = len(graded) // config.minibatches
        parts = []
        for start in range(0, len(graded), share):
            pairs = [
                (g, a)
                for g, a in zip(graded[start : start + share], advantages[start:], strict=False)
                if a is not None
            ]
            lengths = [len(g.rollout.token_ids) for g, _ in pairs]
            weights = rollout_weights(lengths, config.loss, config.max_tokens) if pairs else []
            examples = [
                example(g.rollout, a, w)
                for (g, a), w in zip(pairs, weights, strict=True)
                if a != 0 or config.kl_coef
            ]
            if examples:
                parts.append(pack(examples, config.row_tokens))
        old = None
        if len(parts) > 1:
            old = [
                [
                    score(self.policy, micro, config.temperature)
                    for micro in part.micro_batches(config.micro_rows)
                ]
                for part in parts
            ]
        metrics: dict[str, float] = {}
        mismatch = 0.0
        for i, part in enumerate(parts):
            metrics = self.learner.policy_update(
                part, self.objective, old[i] if old else None, self.reference
            )
            mismatch = max(mismatch, metrics["policy/mismatch_kl"])
        if mismatch > config.max_mismatch_kl:
            raise RuntimeError(
                f"engine and trainer differ by {mismatch:.3g} nats a token (bound {config.max_mismatch_kl}): "
                "the rollouts do not come from these weights"
            )
        return metrics

    # ---- around it

    def heldout(self) -> dict[str, float]:
        """Greedy accuracy on a slice of the held-out problems."""
        self.collector.settle()  # one request at a time
        self.sync()
        prompts = [make_prompt(self.tokenizer, p, self.config.template) for p in self.heldout_problems]
        sampling = SamplingParams(max_tokens=self.config.max_tokens, temperature=0.0)
        graded = self.grade(sample_groups(self.engine, prompts, sampling))
        return {
            "heldout/pass@1": mean([float(g.parts.get("accuracy") == 1) for g in graded]),
            "heldout/tokens_mean": mean([len(g.rollout.token_ids) for g in graded]),
            "heldout/format": mean([g.parts["format"] for g in graded]),
        }

    def checkpoint(self, step: int) -> None:
        """Save all that the next step depends on."""
        reference = None if self.reference is None else self.reference.state_dict()
        ahead = self.collector.settle()

        def write(folder: Any) -> None:
            state = {"learner": self.learner.state_dict(), "reference": reference, "cursor": self.cursor}
            if ahead is not None:  # drawn already, with weights that a resumed run no longer has
                state["ahead"] = ahead.plain()
            torch.save(state, folder / "state.pt")

        self.run_dir.checkpoint(step, write)

    def restore(self) -> int:
        """Go on from the newest checkpoint; the steps it stands for."""
        newest = self.run_dir.latest()
        if newest is None:
            return 0
        step, folder = newest
        state = torch.load(folder / "state.pt", weights_only=True)
        self.learner.load_state_dict(state["learner"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        self.cursor = state["cursor"]
        if "ahead" in state:
            self.collector.put(Round.from_plain(state["ahead"]))
        return step

    def close(self) -> None:
        """Stop engine and graders."""
        self.collector.close()
        self.engine.close()
        self.scorer.close()


def frozen(policy: Policy) -> Policy:
    """A copy that no update touches."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


def example(rollout: Rollout, advantage: float, weight: float) -> Example:
    """Prompt and completion as one sequence; only the completion has weight."""
    prompt = rollout.prompt.token_ids
    return Example(
        token_ids=(*prompt, *rollout.token_ids),
        weights=(*[0.0] * len(prompt), *[weight] * len(rollout.token_ids)),
        rollout_logprobs=(*[0.0] * len(prompt), *rollout.logprobs),
        advantage=advantage,
    )


def rollout_metrics(
    graded: Sequence[Graded], advantages: Sequence[float | None], group_size: int
) -> dict[str, float]:
    """What the step's rollouts looked like."""
    valid = [g for g in graded if g.verdict != "error"]
    groups = [advantages[i : i + group_size] for i in range(0, len(advantages), group_size)]
    out = {
        "reward/mean": mean([g.reward for g in valid]),
        "reward/accuracy": mean([float(g.verdict == "correct") for g in valid]),
        "reward/errors": len(graded) - len(valid),
        "reward/groups_with_spread": mean([float(any(group)) for group in groups]),
        "rollout/tokens_mean": mean([len(g.rollout.token_ids) for g in graded]),
        "rollout/truncated": mean([float(g.rollout.finish_reason == "length") for g in graded]),
    }
    for name in valid[0].parts if valid else ():
        if name != "accuracy":
            out[f"reward/{name}"] = mean([g.parts[name] for g in valid])
    return out


def record(graded: Graded, advantage: float | None) -> dict[str, Any]:
    """A line of samples.jsonl."""
    problem = graded.rollout.prompt.problem
    return {
        "id": problem.id,
        "question": problem.question,
        "kind": problem.kind,
        "language": problem.language,
        "text": graded.text,
        "verdict": graded.verdict,
        "reward": round(graded.reward, 6),
        "parts": dict(graded.parts),
        "advantage": advantage,
        "tokens": len(graded.rollout.token_ids),
        "finish_reason": graded.rollout.finish_reason,
    }
