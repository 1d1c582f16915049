"""What vLLM is started with, as far as that can be tested without vLLM."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from rollout import checkpoint
from rollout.settings import VllmSettings
from rollout.vllm import options

DEEPSEEK = {"model_type": "deepseek_v3", "max_position_embeddings": 64, "vocab_size": 97}


@pytest.fixture
def environment(monkeypatch):
    """The environment, empty of vLLM's variables and put back afterwards."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    monkeypatch.setattr(os, "environ", kept)
    return kept


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (DEEPSEEK, {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}),
        ({**DEEPSEEK, "num_nextn_predict_layers": 1, "scoring_func": "softmax"}, {"topk_method": "noaux_tc"}),
        ({"model_type": "llama"}, {}),
    ],
)
def test_only_keys_that_a_deepseek_config_lacks_are_added(config, missing):
    assert options.missing_keys(config) == missing


def test_the_eos_of_generation_counts_before_that_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert checkpoint.eos_of(tmp_path) == 1
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert checkpoint.eos_of(tmp_path) == 1
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert checkpoint.eos_of(tmp_path) == [3, 4]


@pytest.mark.parametrize(("latent", "disabled"), [((512, 64), "0"), ((16, 4), "1"), ((512, 32), "1")])
def test_the_cpu_takes_the_latent_kernel_only_for_the_shape_that_it_knows(environment, latent, disabled):
    config = dict(zip(("kv_lora_rank", "qk_rope_head_dim"), latent, strict=True))
    options.prepare_environment(config, on_cpu=True, in_process=True)
    assert (
        environment["VLLM_MLA_DISABLE"] == disabled and environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    )
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment


def test_a_gpu_keeps_its_kernels_and_what_the_user_chose_stays(environment):
    environment["VLLM_LOGGING_LEVEL"] = "DEBUG"
    options.prepare_environment({}, on_cpu=False, in_process=False)
    assert "VLLM_MLA_DISABLE" not in environment and environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_the_engine_gets_what_its_device_needs():
    settings = VllmSettings(max_batch=7, cache_gib=0.5, gpu_memory=0.3, tensor_parallel=2)
    on = {
        cpu: options.llm_options(Path("m"), DEEPSEEK, "bfloat16", settings, 48, cpu) for cpu in (True, False)
    }
    for chosen in on.values():
        assert (chosen["max_model_len"], chosen["max_num_seqs"], chosen["dtype"]) == (48, 7, "bfloat16")
        assert chosen["logprobs_mode"] == "processed_logprobs" and chosen["tensor_parallel_size"] == 2
    assert on[True]["kv_cache_memory_bytes"] == 1 << 29 and on[True]["enforce_eager"]
    assert on[True]["enable_chunked_prefill"] is False and on[True]["max_num_batched_tokens"] == 8192
    assert "enable_chunked_prefill" not in on[False]
    assert "-rotary_embedding" in on[True]["compilation_config"]["custom_ops"]
    assert on[False]["gpu_memory_utilization"] == 0.3 and "kv_cache_memory_bytes" not in on[False]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_server_gets_the_flags_of_the_engine(environment, tmp_path, monkeypatch, gpu):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    monkeypatch.setattr(options, "cpu_build", lambda: not gpu)
    settings = VllmSettings(max_batch=7, context=48)
    flags = options.server_flags(tmp_path, "float32", settings)
    expected = options.llm_options(tmp_path, DEEPSEEK, "float32", settings, 48, not gpu)
    flag = dict(itertools.pairwise(flags))
    assert flag["--max-model-len"] == "48" and flag["--max-num-seqs"] == "7" and flag["--dtype"] == "float32"
    assert json.loads(flag["--hf-overrides"]) == expected["hf_overrides"]
    if gpu:
        assert flag["--gpu-memory-utilization"] == str(expected["gpu_memory_utilization"])
    else:
        assert flag["--kv-cache-memory-bytes"] == str(expected["kv_cache_memory_bytes"])
        assert json.loads(flag["--compilation-config"]) == expected["compilation_config"]
        assert flag["--max-num-batched-tokens"] == str(expected["max_num_batched_tokens"])
        assert "--enforce-eager" in flags and "--no-enable-chunked-prefill" in flags


def test_shapes_are_read_from_the_file_as_far_as_an_update_names_them(deepseek_dir):
    names = {"model.norm.weight": (0,), "lm_head.weight": (0,), "not.there": (1,)}
    assert checkpoint.stored_shapes(deepseek_dir, names) == {
        "model.norm.weight": (32,),
        "lm_head.weight": (97, 32),
    }
    with safe_open(next(deepseek_dir.glob("*.safetensors")), framework="pt") as tensors:
        assert len(list(tensors.keys())) > 2
