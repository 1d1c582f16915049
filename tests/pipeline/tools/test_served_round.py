"""Evaluation through the API of our own server, against evaluation from the weights."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.__main__ import main
from pipeline.settings.tools import ServeSettings
from pipeline.tools.conversation import Conversation
from pipeline.tools.serve import Endpoint
from tests.small import random_policy

SUMS = [{"question": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(1, 7)]


def test_our_own_server_and_the_engine_agree(tokenizer, running, monkeypatch, tmp_path):
    """Greedy, through the API and from the weights: the same text and length, question by question."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    policy = random_policy(
        tmp_path / "policy", tokenizer, "boxed", initializer_range=0.2, max_position_embeddings=256
    )
    config = ServeSettings(model=policy, threads=1, port=0, name="m", api_key="secret", timeout_s=60)
    end = ["--benchmark", "sums.jsonl", "--temperature", "0", "--max-tokens", "12", "--threads", "1"]
    endpoint = Endpoint(config, Conversation(config))
    with running(endpoint) as (host, port):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://{host}:{port}/v1")
        assert main(["evaluate", "--model", "m", "--engine", "endpoint", "--out", "far", *end]) == 0
        assert main(["evaluate", "--model", "none", "--engine", "endpoint", "--out", "x", *end]) == 2
    endpoint.talk.engine.close()
    assert main(["evaluate", "--model", str(policy), "--out", "near", *end]) == 0
    far, near = (
        [json.loads(line) for line in Path(name, "generations.jsonl").read_text().splitlines()]
        for name in ("far", "near")
    )
    for one, two in zip(far, near, strict=True):
        assert (one["tokens"], one["finish_reason"]) == (two["tokens"], two["finish_reason"])
        assert one["text"].split() == two["text"].split() != []
