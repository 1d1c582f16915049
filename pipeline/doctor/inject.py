"""Faults on purpose: an engine in this process that samples from something else than the trainer trains on.

`--inject` of the RL stages shows what each cause of a mismatch looks like, and proves that it is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from model.policy import Policy
from pipeline.errors import UserError
from pipeline.settings.rollouts import Fault
from rollout.engine import RolloutEngine, WrappingEngine
from rollout.types import Prompt, Rollout, SamplingParams
from rollout.weights import InPlaceEngine

ROUTE_NOISE = 0.03
"""Standard deviation of what is added to each expert's bias; affinities are in 0 .. 1, and bf16 moves them by
a tenth of that."""
E4M3_MAX = 448.0


class FaultyEngine(WrappingEngine):
    """An engine with one fault; its weights, where they differ, are a copy of the policy's."""

    def __init__(self, engine: RolloutEngine, fault: Fault) -> None:
        """Raises `UserError`: an engine in other processes, or no experts to route."""
        if not isinstance(engine, InPlaceEngine):
            raise UserError("inject needs an engine in this process: --rollout.engine auto, no workers")
        if fault == "route" and not engine.policy.routed:
            raise UserError("inject = route is for models with experts, and this one has none; take another")
        self.engine, self.fault, self.loaded = engine, fault, False
        self.load_weights(engine.policy, 0)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """`template`: the engine reads each prompt without its last token. `eos`: the token that ended a
        completion is dropped. The rollouts' prompts are those that were asked for."""
        asked = list(prompts)
        if self.fault == "template":
            prompts = [replace(p, token_ids=p.token_ids[:-1] or p.token_ids) for p in asked]
        for rollout in self.engine.generate(prompts, sampling):
            if self.fault == "template":
                yield replace(rollout, prompt=asked[rollout.index], routed_experts=None)
            elif self.fault == "eos" and rollout.finish_reason == "stop" and len(rollout.token_ids) > 1:
                routes = None if rollout.routed_experts is None else rollout.routed_experts[:-1]
                ids, logprobs = rollout.token_ids[:-1], rollout.logprobs[:-1]
                yield replace(rollout, token_ids=ids, logprobs=logprobs, routed_experts=routes)
            else:
                yield rollout

    def load_weights(self, source: Any, version: int) -> None:
        """`stale`: keep the first weights. `fp8`: round the matrices to E4M3, a scale a tensor. `route`: add
        the same noise to the experts' biases every time."""
        if self.fault in ("stale", "fp8", "route"):
            if self.fault == "stale" and self.loaded:
                return
            source = source.frozen()
            {"stale": lambda _: None, "fp8": round_to_e4m3, "route": move_routes}[self.fault](source)
        self.engine.load_weights(source, version)
        self.loaded = True


@torch.no_grad()
def round_to_e4m3(policy: Policy) -> None:
    """Round every matrix of `policy` to E4M3 in place."""
    for p in policy.parameters():
        if p.ndim > 1:
            scale = p.abs().amax().clamp(min=1e-12) / E4M3_MAX
            p.copy_((p / scale).to(torch.float8_e4m3fn).to(p.dtype) * scale)


@torch.no_grad()
def move_routes(policy: Policy) -> None:
    """Add noise to the bias by which each gate of `policy` selects, in place."""
    random = torch.Generator().manual_seed(0)
    for name, tensor in policy.public_weights():
        if name.endswith("e_score_correction_bias"):
            tensor += (ROUTE_NOISE * torch.randn(tensor.shape, generator=random)).to(tensor)
