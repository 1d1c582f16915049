"""Which engine opens what, and what a checkpoint directory states."""

from __future__ import annotations

import json
import os
import shutil
import typing

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, T5Config

import model as native
from model.dense import DensePolicy
from model.scale import fp8
from model.transformer import Transformer
from rollout import checkpoint
from rollout.dense.engine import DenseEngine
from rollout.local import LOCAL, load_policy
from rollout.native.engine import NativeEngine
from rollout.open import ENGINES, engine_for, open_engine, open_worker_engine
from rollout.settings import EngineName, LocalSettings, RolloutSettings
from rollout.types import SamplingParams
from rollout.weights import copied, fingerprint
from tests.small import prompt


@pytest.fixture(scope="module")
def llama_dir(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(path)
    return path


def test_the_table_has_every_engine_name_and_every_policy_an_engine():
    assert {"auto", *ENGINES} == set(typing.get_args(EngineName))
    assert {Transformer.engine, DensePolicy.engine} == set(LOCAL) < set(ENGINES)


def test_a_checkpoint_opens_as_its_type_or_as_asked(deepseek_dir, llama_dir):
    settings = LocalSettings(max_batch=3, cache_gib=0.5)
    for path, engine, expected in (
        (deepseek_dir, "auto", NativeEngine),
        (deepseek_dir, "native", NativeEngine),
        (deepseek_dir, "dense", DenseEngine),
        (llama_dir, "auto", DenseEngine),
    ):
        opened, tokenizer = open_engine(path, engine, "bfloat16", local=settings)
        assert type(opened) is expected and tokenizer is None
        assert opened.max_batch == 3 and opened.cache_bytes == 1 << 29
        assert {p.dtype for p in opened.policy.parameters()} == {torch.bfloat16}
    assert open_engine(deepseek_dir)[0].max_batch == 512 and open_engine(llama_dir)[0].max_batch == 256
    with pytest.raises(ValueError, match="is a llama model; engine native is for deepseek_v3"):
        open_engine(llama_dir, "native")
    with pytest.raises(ValueError, match="speculate is for native models"):
        open_engine(llama_dir, local=LocalSettings(speculate=True))


def test_what_no_engine_here_can_generate_from_is_one_line(tmp_path):
    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"T5Config.*AutoModelForCausalLM") as error:
        open_engine(tmp_path / "t5")
    assert "\n" not in str(error.value)
    (tmp_path / "t5/config.json").write_text('{"model_type": "new"}')
    with pytest.raises(ValueError, match="does not recognize") as error:
        open_engine(tmp_path / "t5")
    assert "\n" not in str(error.value)
    MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)).save_pretrained(
        tmp_path / "mamba"
    )
    with pytest.raises(ValueError, match="a mamba model has no max_position_embeddings"):
        open_engine(tmp_path / "mamba")


def test_weights_that_were_cut_off_are_one_line(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 1_000)
    with pytest.raises(ValueError, match="deserializing header"):
        load_policy(tmp_path / "cut")


def test_a_policy_in_training_is_generated_from_in_place(deepseek_dir, llama_dir, tokenizer):
    for path, kind, wrong in ((deepseek_dir, "native", "dense"), (llama_dir, "dense", "native")):
        policy = load_policy(path)
        assert policy.engine == kind
        for name in ("auto", kind):
            engine = engine_for(policy, tokenizer, RolloutSettings(engine=name))
            assert engine.policy is policy and engine.eos_token_id == tokenizer.eos_token_id
        with pytest.raises(ValueError, match=f"is a {kind} model, which rollout.engine = '{wrong}' does not"):
            engine_for(policy, tokenizer, RolloutSettings(engine=wrong))


def test_every_engine_of_a_worker_takes_named_tensors(deepseek_dir, llama_dir):
    """What a worker asks of an engine, native or dense: copy weights in, and prove them."""
    for path in (deepseek_dir, llama_dir):
        engine = open_worker_engine(str(path), RolloutSettings(), "cpu", None)
        sent = {name: tensor * 1.5 for name, tensor in load_policy(path).public_weights()}
        expected = fingerprint(sent.values())
        assert engine.live_weights() != expected
        engine.load_tensors(sent.items(), 4)
        assert engine.live_weights() == expected and engine.version == 4


def test_facts_of_a_checkpoint(deepseek_dir, tmp_path):
    assert checkpoint.model_type(deepseek_dir) == "deepseek_v3"
    assert checkpoint.context_of(deepseek_dir) == 64
    assert checkpoint.context_and_vocabulary(deepseek_dir, 10) == (10, 97)
    assert checkpoint.eos_of(deepseek_dir) == native.load(deepseek_dir).config.eos_token_id == 2
    (tmp_path / "config.json").write_text(json.dumps({"n_ctx": 32}))
    assert checkpoint.context_of(tmp_path) == 32
    with pytest.raises(ValueError, match="lacks max_position_embeddings or vocab_size"):
        checkpoint.context_and_vocabulary(tmp_path, 0)
    with pytest.raises(ValueError, match="is not a model config with a model_type"):
        checkpoint.model_type(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="is not a model config"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        checkpoint.read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
        checkpoint.read_config(tmp_path / "absent")


def test_an_engine_in_fp8_multiplies_in_fp8_beside_a_trainer_that_does_not(deepseek_dir, tokenizer):
    """First tokens come from a prefill, which is the trainer's forward: they tell whose products they are."""
    net, prompts = load_policy(deepseek_dir), [prompt(5, 9, 40), prompt(7, 7, 61, 30, 12)]
    sampling = SamplingParams(max_tokens=4, temperature=1.0, seed=3)
    half, eight = (copied(net, torch.bfloat16) for _ in range(2))
    assert fp8.convert(eight) > 10
    for dtype, near, far in (("fp8", eight, half), ("bfloat16", half, eight)):
        engine = engine_for(net, tokenizer, RolloutSettings(dtype=dtype), deepseek_dir, "float32")
        for factor in (1.0, 2.0, 0.5):  # exact in every type
            with torch.no_grad():
                for p in (*net.parameters(), *half.parameters(), *eight.parameters()):
                    p.mul_(factor)
            engine.load_weights(net, 0)
            for rollout in engine.generate(prompts, sampling):
                ids, token = torch.tensor([rollout.prompt.token_ids]), rollout.token_ids[0]
                with torch.no_grad():
                    want, other = (m.logits(ids)[0, -1].float().log_softmax(-1)[token] for m in (near, far))
                assert rollout.logprobs[0] == pytest.approx(float(want), abs=1e-4)
                assert abs(rollout.logprobs[0] - float(other)) > 1e-3
    assert not any(isinstance(m, fp8.Fp8Linear) for m in net.modules())


def test_fp8_of_a_trainer_reaches_workers_and_not_vllm(deepseek_dir, tokenizer, monkeypatch):
    net, seen = load_policy(deepseek_dir), []
    monkeypatch.setattr("rollout.open.RolloutPool", lambda path, settings, *_, **__: seen.append(settings))
    monkeypatch.setitem(ENGINES, "vllm", lambda path, settings, **_: seen.append(settings))
    monkeypatch.setattr("rollout.open.cpu_build", lambda: True)
    for engine, workers in (("auto", 1), ("vllm", 0), ("vllm", 1)):
        engine_for(net, tokenizer, RolloutSettings(engine=engine, workers=workers), deepseek_dir, "fp8")
    assert [settings.dtype for settings in seen] == ["fp8", "bfloat16", "bfloat16"]
    worker = open_worker_engine(str(deepseek_dir), seen[0], "cpu", None)
    assert any(isinstance(m, fp8.Fp8Experts) for m in worker.policy.modules())
    with pytest.raises(ValueError, match=r"dtype=fp8 is not for engine vllm: set vllm\.quantization"):
        RolloutSettings(engine="vllm", dtype="fp8")
    monkeypatch.setattr(fp8, "supported", lambda device: False)
    with pytest.raises(ValueError, match=r"cpu has no FP8 arithmetic; set rollout\.dtype to bfloat16"):
        engine_for(net, tokenizer, RolloutSettings(dtype="fp8"), deepseek_dir, "float32")
