"""From graded rollouts to what a step trains on and what it logs: advantages, examples, metrics, transcripts.

Papers  GRPO         arXiv:2402.03300  Sec. 4.1.2 (mean and standard deviation of the group)
        Dr. GRPO     arXiv:2503.20783  Sec. 3.1 (the division by the deviation favours easy and hard prompts)
        REINFORCE++  arXiv:2501.03262  its baseline variant (group mean, then the deviation of the batch)
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from model.policy import Policy
from pipeline.errors import Stopped, UserError
from pipeline.run.directory import RunDir
from pipeline.run.metrics import say
from pipeline.train.pack import Example
from rewards.reward import error_share
from rollout.text.tokenizer import turn_texts
from rollout.types import Graded, Rollout

FAILED_STEPS = 2
"""Steps in a row with too many verifier failures that stop a run; one may be an accident."""
Scale = Literal["std", "none", "batch"]
"""What advantages are divided by: the deviation of the group, nothing, or the deviation of the batch."""


def group_advantages(rewards: Sequence[float | None], scale: Scale) -> list[float | None]:
    """Advantages of one group's rollouts: reward less group mean, over the standard deviation for `std`.

    A reward is None where the verifier failed: such a rollout is left out of the mean and its advantage is
    None. The deviation is the population's, as in GRPO. A group without spread gets zeros."""
    centre, spread = moments([r for r in rewards if r is not None])
    if spread < 1e-8:
        return [None if r is None else 0.0 for r in rewards]
    unit = spread if scale == "std" else 1.0
    return [None if r is None else (r - centre) / unit for r in rewards]


def batch_advantages(groups: Sequence[Sequence[float | None]], scale: Scale) -> list[float | None]:
    """Advantages of all groups' rollouts, in order: `group_advantages`; for `batch` without the group's
    deviation, but over that of all of them (REINFORCE++'s baseline; their mean is 0 already)."""
    found = [advantage for group in groups for advantage in group_advantages(group, scale)]
    unit = moments([a for a in found if a is not None])[1] if scale == "batch" else 1.0
    return [a and a / unit for a in found]  # a unit of 0: each is 0 or None


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a population; zeros of nothing."""
    centre = math.fsum(values) / max(1, len(values))
    return centre, math.sqrt(math.fsum((v - centre) ** 2 for v in values) / max(1, len(values)))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def example(rollout: Rollout, advantage: float, weight: float, share: bool = False) -> Example:
    """Prompt and completion as one sequence; only what the model sampled has weight. `share`: a row has the
    prompt once for all its samples."""
    prompt, n = rollout.prompt.token_ids, len(rollout.token_ids)
    zeros, weights = np.zeros(len(prompt), np.float32), np.full(n, weight, np.float32)
    for first, end in rollout.observed:
        weights[first:end] = 0.0
    return Example(
        token_ids=np.concatenate([np.array(prompt, np.int32), np.asarray(rollout.token_ids, np.int32)]),
        weights=np.concatenate([zeros, weights]),
        rollout_logprobs=np.concatenate([zeros, np.asarray(rollout.logprobs, np.float32)]),
        advantage=advantage,
        routed_experts=rollout.routed_experts,
        prefix=len(prompt) if share else 0,
    )


def check_routes(policy: Policy, rollouts: Iterable[Rollout], needed: bool) -> None:
    """Raise `UserError` for experts that an engine recorded of another model than `policy`; where they are
    `needed`, for none too."""
    for r in rollouts:
        try:
            if r.routed_experts is not None:
                policy.check_routes(r.routed_experts, len(r.prompt.token_ids) + len(r.token_ids))
            elif needed:
                raise ValueError("there are none: the engine did not record them")
        except ValueError as error:
            which = f"the experts recorded for prompt {r.index}, sample {r.sample}, are not this policy's"
            way = "sample with the policy's own model, or go on with --no-router-replay"
            raise UserError(f"{which}: {error}; {way}") from error


def rollout_metrics(graded: Sequence[Graded]) -> dict[str, float]:
    """Means over rollouts of reward, its parts and length; verifier failures count in `errors` alone."""
    valid = [g for g in graded if g.verdict != "error"]
    names = dict.fromkeys(name for g in valid for name in g.parts)
    told, observed = dict[str, float](), [g.rollout.observed for g in graded]
    if any(observed):
        told["rollout/observations"] = mean([len(spans) for spans in observed])
        told["rollout/observed"] = mean([sum(end - first for first, end in spans) for spans in observed])
    return {
        "reward/mean": mean([g.reward for g in valid]),
        "reward/accuracy": mean([float(g.verdict == "correct") for g in valid]),
        "reward/errors": len(graded) - len(valid),
        "rollout/tokens_mean": mean([len(g.rollout.token_ids) for g in graded]),
        "rollout/truncated": mean([float(g.rollout.finish_reason == "length") for g in graded]),
        **told,
    } | {f"reward/{name}": mean([g.parts[name] for g in valid]) for name in names if name != "accuracy"}


def transcript(graded: Graded, advantage: float | None, tokenizer: Any = None) -> dict[str, Any]:
    """A line of samples.jsonl; read by `tokenizer`, with what an environment wrote, where there is any."""
    rollout, problem = graded.rollout, graded.rollout.prompt.problem
    asked = {name: getattr(problem, name) for name in ("id", "question", "kind", "language", "source")}
    if rollout.observed:
        asked["turns"] = turn_texts(tokenizer, rollout)
    return asked | {
        "text": graded.text,
        "verdict": graded.verdict,
        "reward": round(graded.reward, 6),
        "parts": dict(graded.parts),
        "advantage": advantage,
        "tokens": len(rollout.token_ids),
        "finish_reason": rollout.finish_reason,
    }


class Watch:
    """Says which rollouts of a step cannot teach, and stops the run when such steps come in a row."""

    def __init__(self, run_dir: RunDir, max_error_share: float, max_idle_steps: int = 0) -> None:
        """See `GrpoSettings` on the bounds."""
        self.run_dir, self.max_error_share, self.max_idle_steps = run_dir, max_error_share, max_idle_steps
        self.failed = self.idle = 0  # steps in a row

    def look(self, step: int, graded: Sequence[Graded], spread: float = 1.0) -> None:
        """Say what is wrong with a step's rollouts; `spread` is the share of groups whose rewards differ."""
        (share, reason), n = error_share(graded), len(graded)
        self.failed = self.failed + 1 if share > self.max_error_share else 0
        cut = all(g.rollout.finish_reason == "length" for g in graded)
        turns = any(g.rollout.observed for g in graded)  # then they may have been cut by their number
        self.idle = 0 if spread and (turns or not cut) else self.idle + 1
        if share:
            why = f"most often: {reason or 'no reason given'}"
            say(f"step {step}: the verifier failed on {share:.0%} of {n} rollouts; {why}")
        if cut:
            most = max(len(g.rollout.token_ids) for g in graded)
            way = "raise --max-tokens" + " or --max-turns" * turns
            say(f"step {step}: all {n} rollouts were cut at {most} tokens: {way}")
        if not spread and share < 1:
            means = rollout_metrics(graded)["reward/mean"]
            why = f"no group of this step has spread in its rewards (mean {means:.3g}), so it teaches nothing"
            say(f"step {step}: {why}: take other problems or a larger group_size")

    def check(self) -> None:
        """Raise `Stopped` where too many steps in a row were of no use."""
        kept, again = self.run_dir.kept(), f"{self.run_dir.command} --resume"
        if self.failed >= FAILED_STEPS:
            what = f"on more than {self.max_error_share:.0%} of the rollouts of {self.failed} steps in a row"
            raise Stopped(
                f"the verifier failed {what} (max_error_share); mend it, see above. {kept}; then: {again}"
            )
        if self.max_idle_steps and self.idle >= self.max_idle_steps:
            what = f"for {self.idle} steps in a row (max_idle_steps): the rewards tell no answers apart"
            way = "take another --name with other problems, rewards or limits, or a lower rate"
            raise Stopped(
                f"no group had spread in its rewards, or every rollout was cut, {what}, or the policy is "
                f"destroyed. {kept}; {way}, or go on as it is: {again} --max-idle-steps 0"
            )

    def state_dict(self) -> dict[str, int]:
        """What `check` depends on."""
        return {"failed": self.failed, "idle": self.idle}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` returned."""
        self.failed, self.idle = state["failed"], state["idle"]
