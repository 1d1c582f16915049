"""What the rollout benchmarks generate: ragged prompts, and completions that end raggedly."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from rollout.native.engine import NativeEngine
from rollout.types import Problem, Prompt, SamplingParams
from tests.bench._peer import CONFIG, ours, theirs
from tests.bench.measure import peak_bytes

PROMPTS, SAMPLES, NEW = 64, 8, 512
STOPS = tuple(range(20))
"""Twenty of 4,096 near-uniform tokens end a completion: geometric lengths, cut at `NEW`, 190 on average."""


def ragged_prompts(number: int, vocab: int, seed: int) -> list[Prompt]:
    """Random tokens, 16 to 128 of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, 129, (number,), generator=generator).tolist()
    problem = Problem(id="bench", kind="general", question="")
    return [
        Prompt(problem, "raw", tuple(torch.randint(len(STOPS), vocab, (n,), generator=generator).tolist()))
        for n in lengths
    ]


def sample_ours(engine: NativeEngine, prompts: Sequence[Prompt], seed: int) -> int:
    """Number of completion tokens; the complete request at once."""
    sampling = SamplingParams(max_tokens=NEW, n=SAMPLES, seed=seed, stop_token_ids=STOPS, temperature=1.0)
    return sum(len(rollout.token_ids) for rollout in engine.generate(prompts, sampling))


@torch.no_grad()
def sample_theirs(peer: Any, prompts: Sequence[Prompt], seed: int) -> int:
    """Number of completion tokens of transformers' generate, in one left-padded batch.

    Tokens that it generates for rows that have ended do not count.
    """
    torch.manual_seed(seed)
    longest = max(len(p.token_ids) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p.token_ids)) + list(p.token_ids) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
    out = peer.generate(
        ids.repeat_interleave(SAMPLES, 0), attention_mask=mask.repeat_interleave(SAMPLES, 0), do_sample=True,
        temperature=1.0, top_k=0, max_new_tokens=NEW, eos_token_id=list(STOPS), pad_token_id=0,
    )  # fmt: skip
    new = out[:, longest:]
    ends = (new < len(STOPS)).int()
    return int(torch.where(ends.any(1), ends.argmax(1) + 1, new.shape[1]).sum())


def main(who: str, batch: int) -> None:
    """Generate once, in a process of its own; print tokens, seconds, and the growth of peak memory."""
    net = ours().eval()
    everything = ragged_prompts(PROMPTS, CONFIG.vocab_size, seed=0)
    few = everything[: max(1, batch // SAMPLES)]
    engine = NativeEngine(net)
    peer = theirs(net, "eager", "grouped_mm").eval() if who == "theirs" else None
    before, begin = peak_bytes(), time.perf_counter()
    tokens = sample_theirs(peer, few, 0) if peer is not None else sample_ours(engine, everything, 0)
    print(tokens, time.perf_counter() - begin, peak_bytes() - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
