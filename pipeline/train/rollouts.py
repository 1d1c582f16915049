"""From graded rollouts to what a step trains on and what it logs: examples, metrics, transcripts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.train.pack import Example
from rollout.types import Graded, Rollout


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def example(rollout: Rollout, advantage: float, weight: float) -> Example:
    """Prompt and completion as one sequence; only the completion has weight."""
    prompt, n = rollout.prompt.token_ids, len(rollout.token_ids)
    zeros = np.zeros(len(prompt), np.float32)
    return Example(
        token_ids=np.concatenate([np.array(prompt, np.int32), np.asarray(rollout.token_ids, np.int32)]),
        weights=np.concatenate([zeros, np.full(n, weight, np.float32)]),
        rollout_logprobs=np.concatenate([zeros, np.asarray(rollout.logprobs, np.float32)]),
        advantage=advantage,
    )


def error_share(graded: Sequence[Graded]) -> float:
    """Share of rollouts whose verifier failed."""
    return mean([float(g.verdict == "error") for g in graded])


def rollout_metrics(graded: Sequence[Graded]) -> dict[str, float]:
    """Means over rollouts of reward, its parts and length; verifier failures count in `errors` alone."""
    valid = [g for g in graded if g.verdict != "error"]
    names = dict.fromkeys(name for g in valid for name in g.parts)
    return {
        "reward/mean": mean([g.reward for g in valid]),
        "reward/accuracy": mean([float(g.verdict == "correct") for g in valid]),
        "reward/errors": len(graded) - len(valid),
        "rollout/tokens_mean": mean([len(g.rollout.token_ids) for g in graded]),
        "rollout/truncated": mean([float(g.rollout.finish_reason == "length") for g in graded]),
    } | {f"reward/{name}": mean([g.parts[name] for g in valid]) for name in names if name != "accuracy"}


def transcript(graded: Graded, advantage: float | None) -> dict[str, Any]:
    """A line of samples.jsonl."""
    rollout, problem = graded.rollout, graded.rollout.prompt.problem
    asked = {
        "id": problem.id,
        "question": problem.question,
        "kind": problem.kind,
        "language": problem.language,
    }
    return asked | {
        "text": graded.text,
        "verdict": graded.verdict,
        "reward": round(graded.reward, 6),
        "parts": dict(graded.parts),
        "advantage": advantage,
        "tokens": len(rollout.token_ids),
        "finish_reason": rollout.finish_reason,
    }
