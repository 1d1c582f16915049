"""A decoding step, batch 32, fp32, at growing context, against transformers' DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from model import DEEPSEEK_V3
from tests.bench._peer import CONFIG, ours, theirs
from tests.bench.measure import Candidate, apart

SUMMARY = "decoding step, batch 32, at 128, 512 and 960 tokens of context"
BATCH, STEPS, ROUNDS = 32, 16, 5
"""Steps of a round: several, for the first finds the processor's cache full of the others' weights."""
BOUNDS = {128: 3.0, 512: 12.0, 960: 18.0}


def our_steps(context: int) -> Callable[[], None]:
    """`STEPS` tokens for every row from a cache of `context` tokens, head included."""
    net = ours().eval()
    prompt = torch.randint(CONFIG.vocab_size, (BATCH, context), generator=torch.Generator().manual_seed(0))
    cache = net.new_cache(BATCH, context + STEPS)
    net.prefill(prompt.tolist(), cache)

    @torch.no_grad()
    def steps() -> None:
        cache.lengths[:] = context  # the same latents again each time: what lies behind them is overwritten
        token = prompt[:, :1]
        for _ in range(STEPS):
            token = net.lm_head(net.decode(token, cache)).argmax(-1)

    return steps


def their_steps(attention: str, experts: str, context: int) -> Callable[[], None]:
    """The same through transformers' dynamic cache, cropped back before each round."""
    peer = theirs(ours(), attention, experts).eval()
    prompt = torch.randint(CONFIG.vocab_size, (BATCH, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = peer(prompt, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def steps() -> None:
        cache.crop(context)
        token = prompt[:, :1]
        for _ in range(STEPS):
            out = peer(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)

    return steps


def run() -> dict[str, Any]:
    """Milliseconds a step, against what `from_pretrained` sets up; its fastest setting beside it."""
    claims, table = [], {}
    for context, bound in BOUNDS.items():
        timings = apart(
            {
                "ours": Candidate(our_steps, (context,)),
                "transformers": Candidate(their_steps, ("sdpa", "grouped_mm", context)),
                "transformers eager grouped_mm": Candidate(their_steps, ("eager", "grouped_mm", context)),
            },
            ROUNDS,
        )
        ratio = timings["ours"].ratio(timings["transformers"])
        claims.append({"claim": f"decoding at {context} tokens", "value": ratio, "at_least": bound})
        table[context] = {name: 1e3 * timing.median / STEPS for name, timing in timings.items()}
    v3 = DEEPSEEK_V3
    latent = 2 * v3.latent_dim * v3.num_hidden_layers
    claims.append(
        {"claim": "KV cache of DeepSeek-V3, bf16", "value": latent, "at_most": 70272, "unit": "bytes/token"}
    )
    whole = 2 * v3.num_hidden_layers * v3.num_attention_heads * (v3.qk_head_dim + v3.v_head_dim)
    return {
        "claims": claims,
        "milliseconds_a_step": table,
        "kv_bytes_a_token": {"latent": latent, "same heads without latent compression": whole},
    }
