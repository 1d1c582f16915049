"""A pool's worker: an engine with weights of its own, in a process of its own. What Ray makes an actor of."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rollout.engine import StaleWeights
from rollout.settings import RolloutSettings, torch_dtype
from rollout.types import FinishReason, Prompt, SamplingParams
from rollout.weights import Policy, fingerprint, public_weights

Drawn = tuple[int, int, tuple[int, ...], tuple[float, ...], FinishReason, int]
"""A rollout without its prompt: place in the part, sample, tokens, log-probabilities, end, version."""
FLUSH_S = 0.2
"""Seconds over which finished rollouts are gathered into one answer."""


class Worker:
    """An engine of any kind that takes its weights as named tensors."""

    def __init__(
        self, path: str, settings: RolloutSettings, eos_token_id: int | Sequence[int] | None
    ) -> None:
        from rollout.open import NATIVE_TYPES, dense_engine, model_type, native_engine
        from rollout.text.tokenizer import has_tokenizer, load_tokenizer

        torch.set_num_threads(max(1, int(settings.worker_cpus)))
        self.engine: Any
        self.policy: Policy | None = None  # of the in-process engines, which draw from it in place
        if settings.engine == "vllm":
            from rollout.vllm.engine import VllmEngine

            self.engine = VllmEngine(
                path, dtype=settings.dtype, settings=settings.vllm, eos_token_id=eos_token_id
            )
            return
        dtype = torch_dtype(settings.dtype)
        tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
        device = "cuda" if settings.worker_gpus and torch.cuda.is_available() else "cpu"
        if model_type(path) in NATIVE_TYPES:
            import model

            self.policy = net = model.load(path, dtype=dtype, device=device)
            self.engine = native_engine(net, settings.local, tokenizer, eos_token_id)
        else:
            from model.dense import load_dense

            self.policy = dense = load_dense(path, dtype, device)
            self.engine = dense_engine(dense.network, settings.local, tokenizer, eos_token_id)

    def who(self) -> tuple[int, str]:
        """Process id and machine; answers when the engine is open."""
        return os.getpid(), os.uname().nodename

    def load(self, weights: dict[str, Tensor], version: int, want: int) -> None:
        """Take these weights, and prove that they are live."""
        if self.policy is None:
            self.engine.load_tensors(list(weights.items()), version)
            live = self.engine.live_weights()
        else:
            with torch.no_grad():
                for name, tensor in public_weights(self.policy):
                    tensor.copy_(weights[name])
            self.engine.version = version
            live = fingerprint(tensor for _, tensor in public_weights(self.policy))
        if live != want:
            raise StaleWeights(
                f"worker {os.getpid()} holds weights with fingerprint {live:016x} after the update to "
                f"version {version}, not the {want:016x} that were sent"
            )

    def draw(
        self,
        weights: dict[str, Tensor] | None,
        update: tuple[int, int] | None,
        prompts: list[Prompt],
        sampling: SamplingParams,
    ) -> Iterator[list[Drawn]]:
        """Load `weights`, if any (version and fingerprint in `update`); yield rollouts as they end."""
        if weights is not None and update is not None:
            self.load(weights, *update)
        ended: list[Drawn] = []
        since = time.monotonic()
        for r in self.engine.generate(prompts, sampling):
            ended.append((r.index, r.sample, r.token_ids, r.logprobs, r.finish_reason, r.policy_version))
            if time.monotonic() - since > FLUSH_S:
                yield ended
                ended, since = [], time.monotonic()
        if ended:
            yield ended
