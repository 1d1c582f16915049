"""Convert vLLM outputs to our `Rollout`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.cache import route_dtype
from rollout.stopping import Stopper
from rollout.types import FinishReason, Prompt, Rollout


class Ends:
    """Where stop strings end completions that grow: vLLM runs without a tokenizer and cannot find them."""

    def __init__(self, stopper: Stopper) -> None:
        self.stopper = stopper
        self.seen: dict[str, int] = {}  # tokens of each request that were searched

    def find(self, request: str, tokens: list[int]) -> int | None:
        """The length at which the request ends, if it does within `tokens`."""
        begin, self.seen[request] = self.seen.get(request, 0), len(tokens)
        if not self.stopper.strings:
            return None
        lengths = range(begin + 1, len(tokens) + 1)
        return next((n for n in lengths if self.stopper.ends(tokens[:n])), None)


def to_rollout(
    prompt: Prompt,
    index: int,
    sample: int,
    output: Any,
    version: int,
    end: int | None,
    config: Mapping[str, Any],
) -> Rollout:
    """A completion of vLLM as a `Rollout`, up to token `end` where a stop string ends it. `config` is
    the model's config.json: its first layers may have no experts."""
    logprobs = tuple(map(float, output.logprobs.logprobs))[:end]
    if not all(map(math.isfinite, logprobs)):
        step = next(i for i, value in enumerate(logprobs) if not math.isfinite(value))
        raise FloatingPointError(
            f"logits are NaN or infinite at decode step {step} (prompt {index}, sample {sample}); "
            "the weights have diverged: lower the learning rate or go back to an earlier checkpoint."
        )
    tokens, routes = list(output.token_ids)[:end], routes_of(output, len(prompt.token_ids), end, config)
    reason: FinishReason = "stop" if end is not None or output.finish_reason == "stop" else "length"
    return Rollout(prompt, index, sample, tokens, logprobs, reason, version, routes)


def routes_of(output: Any, prompt: int, end: int | None, config: Mapping[str, Any]) -> Tensor | None:
    """The experts of a completion as `Rollout.routed_experts` has them, where vLLM returns them.

    vLLM has a row for every layer; those of dense layers mean nothing.
    Raises `RuntimeError`: not a row for every token but the last."""
    found = getattr(output, "routed_experts", None)
    if found is None:
        return None
    routes = torch.as_tensor(np.asarray(found).astype(np.int64))[:, config.get("first_k_dense_replace", 0) :]
    expected = prompt + len(output.token_ids) - 1
    if len(routes) != expected:
        raise RuntimeError(f"vLLM recorded the experts of {len(routes)} tokens, not of {expected}")
    kept = routes if end is None else routes[: prompt + end - 1]
    return kept.to(route_dtype(config.get("n_routed_experts") or int(routes.max()) + 1))
