"""One training step, 8 sequences of 256 tokens, against transformers' DeepSeek-V3, in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner
from pipeline.train.pack import Example, mean_weights, pack
from tests.bench._peer import ATTENTION, CONFIG, ours, theirs
from tests.bench.measure import Candidate, Timing, apart

SUMMARY = "training step, 8 x 256 tokens, against transformers' DeepSeek-V3"
ROWS, TOKENS = 8, 256
SCOUTING, ROUNDS = 5, 15
STEPS = 2
"""Updates of a round: in training one follows the other."""


def token_ids() -> torch.Tensor:
    """The batch, `rows tokens`."""
    return torch.randint(CONFIG.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def our_step(precision: str) -> Callable[[], Any]:
    """Updates of the learner on packed rows: the path that every stage takes."""
    weights = mean_weights([[True] * TOKENS] * ROWS)
    batch = pack([Example(i, w) for i, w in zip(token_ids().tolist(), weights, strict=True)], ROWS * TOKENS)
    net = ours().train()
    learner = Learner(net, OptimSettings(lr=1e-4, precision=precision), 1000)

    def steps() -> None:
        for _ in range(STEPS):
            learner.supervised_update(batch)

    return steps


def their_step(attention: str, experts: str, amp: bool) -> Callable[[], Any]:
    """Forward with the model's own loss, backward, clip, fused AdamW; bf16 under autocast."""
    peer = theirs(ours(), attention, experts).train()
    adamw = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = token_ids()

    def steps() -> None:
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = peer(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)

    return steps


def run() -> dict[str, Any]:
    """The peer's settings against each other, then ours against its two best ones; the claims are the worse.

    A busy machine changes its speed within a round of ten candidates. Only neighbours in time compare.
    """
    timings: dict[str, Timing] = {}
    claims = []
    for precision, amp in (("float32", False), ("bfloat16", True)):
        settings = {
            f"{'amp' if amp else 'fp32'} {attention} {experts}": Candidate(
                their_step, (attention, experts, amp)
            )
            for attention in ATTENTION
            for experts in ("eager", "grouped_mm")  # batched_mm copies the weights of every token's experts
        }
        first = apart(settings, SCOUTING)
        best = sorted(settings, key=lambda name, first=first: first[name].median)[:2]
        ours_name = f"ours {precision}"
        final = apart(
            {
                best[0]: settings[best[0]],
                ours_name: Candidate(our_step, (precision,)),
                best[1]: settings[best[1]],
            },
            ROUNDS,
        )
        timings |= first | final
        ratios = {name: final[ours_name].ratio(final[name]) for name in best}
        against = min(ratios, key=lambda name, ratios=ratios: ratios[name])
        claims.append(
            {
                "claim": f"training step, {precision}, against {against}",
                "value": ratios[against],
                "at_least": 1.3,
            }
        )
    return {"claims": claims, "timings": {name: timing.report() for name, timing in timings.items()}}
