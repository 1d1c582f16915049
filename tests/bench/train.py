"""One training step, 8 sequences of 256 tokens, against transformers' DeepSeek-V3, in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.config import OptimConfig
from pipeline.learner import Learner
from pipeline.pack import Example, mean_weights, pack
from tests.bench._peer import ATTENTION, CONFIG, ours, theirs
from tests.bench.measure import Candidate, apart

SUMMARY = "training step, 8 x 256 tokens, against transformers' DeepSeek-V3"
ROWS, TOKENS = 8, 256
ROUNDS = 7


def token_ids() -> torch.Tensor:
    """The batch, `rows tokens`."""
    return torch.randint(CONFIG.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def our_step(precision: str) -> Callable[[], Any]:
    """An update of the learner on packed rows: the path that every stage takes."""
    weights = mean_weights([[True] * TOKENS] * ROWS)
    batch = pack([Example(i, w) for i, w in zip(token_ids().tolist(), weights, strict=True)], TOKENS)
    net = ours().train()
    learner = Learner(net, OptimConfig(lr=1e-4, precision=precision), 1000, micro_rows=ROWS)
    return lambda: learner.supervised_update(batch)


def their_step(attention: str, experts: str, amp: bool) -> Callable[[], Any]:
    """Forward with the model's own loss, backward, clip, fused AdamW; bf16 under autocast."""
    peer = theirs(ours(), attention, experts).train()
    adamw = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = token_ids()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = peer(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


def run() -> dict[str, Any]:
    """Our step against each of the peer's settings; the claims are against its best one."""
    candidates = {
        f"ours {precision}": Candidate(our_step, (precision,)) for precision in ("float32", "bfloat16")
    }
    for attention in ATTENTION:
        for experts in ("eager", "grouped_mm"):  # batched_mm copies the weights of every token's experts
            for kind, amp in (("fp32", False), ("amp", True)):
                candidates[f"{kind} {attention} {experts}"] = Candidate(their_step, (attention, experts, amp))
    timings = apart(candidates, ROUNDS)
    claims = []
    for precision, kind in (("float32", "fp32"), ("bfloat16", "amp")):
        best = min((name for name in timings if name.startswith(kind)), key=lambda name: timings[name].median)
        ratio = timings[f"ours {precision}"].ratio(timings[best])
        claims.append(
            {"claim": f"training step, {precision}, against {best}", "value": ratio, "at_least": 1.3}
        )
    return {"claims": claims, "timings": {name: timing.report() for name, timing in timings.items()}}
