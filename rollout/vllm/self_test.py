"""Compare an engine with our own model before anything is generated from it.

A greedy continuation of a few made-up prompts is scored, teacher-forced, by our model: each token must be its
choice too and have the log-probability that the engine reported. Then the same weights are loaded again and
the comparison is repeated: it also finds an engine that breaks at its first update.

Axes    s tokens of a prompt and its completion; v vocabulary
Units   log-probabilities in nats
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.policy import Policy
from rollout.engine import RolloutEngine, StaleWeights
from rollout.local import load_policy
from rollout.types import Problem, Prompt, Rollout, SamplingParams

LENGTHS = (24, 7, 1, 15)
NEW_TOKENS = 12
BOUND_FP32 = 1e-3
"""Largest difference of a log-probability. Sound engines differ by about 1e-5, the known faults by over 1."""
BOUND_BF16 = 0.3
"""Mean difference: single tokens differ by more than 1 where rounding changes a token's experts."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An engine's rollouts beside teacher forcing by our model."""

    tokens: int
    mean: float  # of |log-probability of the engine - of our model|
    worst: float
    regret: float  # largest gap of our best logit to the chosen token's; 0 when greedy tokens are equal


def probes(vocab_size: int, max_positions: int) -> list[Prompt]:
    """Made-up prompts of several lengths, always the same."""
    generator = torch.Generator().manual_seed(0)
    problem = Problem(id="self-test", kind="general", question="")
    lengths = [min(n, max_positions - NEW_TOKENS) for n in LENGTHS]
    ids = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths if n > 0]
    return [Prompt(problem, "raw", tuple(row)) for row in ids]


@torch.no_grad()
def compare(rollouts: Sequence[Rollout], reference: Policy, temperature: float = 0.0) -> Comparison:
    """Score `rollouts` by `reference`. The regret counts at temperature 0 alone."""
    device = next(reference.parameters()).device
    gaps, regrets = [], []
    training = reference.training
    reference.eval()
    try:
        for rollout in rollouts:
            ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]], device=device)
            logits = reference.logits(ids)[0, len(rollout.prompt.token_ids) - 1 : -1].float().cpu()  # s v
            chosen = torch.tensor(list(rollout.token_ids)).unsqueeze(1)
            expected = (logits / (temperature or 1)).log_softmax(-1).gather(1, chosen).squeeze(1)
            gaps.append((expected - torch.tensor(list(rollout.logprobs))).abs())
            regrets.append((logits.amax(-1) - logits.gather(1, chosen).squeeze(1)).max())
    finally:
        reference.train(training)
    gap, regret = torch.cat(gaps), float(torch.stack(regrets).max())
    return Comparison(len(gap), float(gap.mean()), float(gap.max()), regret)


def self_test(engine: RolloutEngine, path: Path, reference: Policy | None, dtype: torch.dtype) -> None:
    """Refuse an engine that does not compute what our model of checkpoint `path` computes.

    Args:
        reference: the trainer's model, which must still hold the checkpoint's weights; None = load it.
        dtype: the engine's.

    Raises:
        StaleWeights: with the size of the difference, and when it appeared.
    """
    reference = load_policy(path, dtype) if reference is None else reference
    config = reference.config
    prompts = probes(config.vocab_size, config.max_position_embeddings)
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    for when in ("as loaded", "after an update with the same weights"):
        if when != "as loaded":
            engine.load_weights(reference, version=0)
        found = compare(list(engine.generate(prompts, greedy)), reference)
        exact = dtype == torch.float32
        if (found.worst > BOUND_FP32 or found.regret > BOUND_FP32) if exact else found.mean > BOUND_BF16:
            raise StaleWeights(
                f"{type(engine).__name__} on {path} is not our model, {when}: over {found.tokens} greedy "
                f"tokens log-probabilities differ by {found.mean:.3g} nats on average, {found.worst:.3g} at "
                "most; it is another model's policy. Use --engine native or dense, and report this with the "
                "versions of vllm and torch."
            )
