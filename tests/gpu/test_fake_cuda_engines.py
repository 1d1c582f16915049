"""Engines and the command `generate` on the fake GPU: the CPU's tokens, and nothing that a GPU refuses."""

from __future__ import annotations

import json

import pytest
import torch

from model.dense import DensePolicy
from model.transformer import Transformer
from pipeline.settings.tools import GenerateSettings
from pipeline.tools import generate
from rollout.dense.engine import DenseEngine
from rollout.native.engine import NativeEngine
from rollout.types import Problem, Prompt, SamplingParams
from tests.gpu.fake_cuda import fake_cuda
from tests.small import llama, random_policy, tiny

PROMPTS = [
    Prompt(Problem(id="0", kind="general", question=""), "none", tuple(range(5, 5 + n)))
    for n in (3, 17, 40, 9)
]
SAMPLING = SamplingParams(max_tokens=8, temperature=1.0, n=2, ignore_eos=True)
ENGINES = {"native": NativeEngine, "dense": DenseEngine}


def policy(engine):
    if engine == "dense":
        return DensePolicy(llama())
    return Transformer(tiny(97, num_nextn_predict_layers=1), seed=0).eval()


def sampled(engine):
    return {
        (r.index, r.sample): (list(r.token_ids), list(r.logprobs)) for r in engine.generate(PROMPTS, SAMPLING)
    }


@pytest.mark.parametrize(
    ("engine", "dtype", "options"),
    [
        ("native", torch.float32, {}),
        ("native", torch.float32, {"speculate": True, "record_routes": True}),
        ("native", torch.bfloat16, {}),
        ("native", torch.bfloat16, {"speculate": True}),
        ("dense", torch.float32, {}),
        ("dense", torch.bfloat16, {}),
    ],
)
def test_an_engine_samples_as_on_the_cpu(engine, dtype, options):
    net = policy(engine).to(dtype)
    want = sampled(ENGINES[engine](net, **options))
    with fake_cuda() as found:
        opened = ENGINES[engine](net.to("cuda"), **options)
        got = sampled(opened)
        captured = engine == "native" and opened.graphs is not None
    assert captured == (engine == "native" and dtype == torch.bfloat16)
    assert not found.mixed and not found.captured, found.report()
    assert [ids for ids, _ in got.values()] == [ids for ids, _ in (want[key] for key in got)]
    near = 1e-5 if dtype == torch.float32 else 0.05
    for key, (_, logprobs) in got.items():
        assert logprobs == pytest.approx(want[key][1], abs=near)


def test_a_step_that_waits_cannot_be_captured(monkeypatch):
    monkeypatch.setattr("rollout.native.engine.capturable", lambda net: True)
    with fake_cuda() as found:
        sampled(NativeEngine(policy("native").to("cuda")))  # fp32: the grouped product copies to the host
    assert sum(found.captured.values()) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["native", "dense"])
def test_the_command_generate(engine, dtype, tmp_path, tokenizer, capsys):
    path = tmp_path / "model"
    if engine == "native":
        random_policy(path, tokenizer, "r1")
    else:
        DensePolicy(llama(vocab_size=len(tokenizer))).save(path)
        tokenizer.save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "3+4=?"}\n{"token_ids": [5, 6, 7]}\n')
    rows = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.jsonl"
        config = GenerateSettings(
            model=path, prompts=prompts, out=out, samples=2, max_tokens=6, device=device, dtype=dtype
        )  # fmt: skip
        if device == "cpu":
            generate.main(config)
        else:
            with fake_cuda() as found:
                generate.main(config)
        rows[device] = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["engine"] == engine
    assert not found.mixed and not found.captured, found.report()
    assert found.peak > 0  # it did lie there
    for part in ("token_ids", "text", "finish_reason"):
        assert [row[part] for row in rows["cuda"]] == [row[part] for row in rows["cpu"]]
