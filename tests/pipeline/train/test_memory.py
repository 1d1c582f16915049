"""Too little memory is found before training, by name, with what would fit; what fits is never refused."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import Qwen2Config

from model import TINY
from model.sizes.published import MOONLIGHT_16B
from pipeline.__main__ import main
from pipeline.arguments import load
from pipeline.errors import UserError
from pipeline.settings.common import OptimSettings
from pipeline.settings.rollouts import GrpoSettings
from pipeline.table import STAGES
from pipeline.train import memory
from pipeline.train.memory import Need, check_memory, container_bytes, free_bytes
from pipeline.train.place import Place
from rollout.settings import RolloutSettings, VllmSettings
from tests.conftest import ROOT
from tests.small import random_policy

CPU, GPU = Place(torch.device("cpu")), Place(torch.device("cuda"))
QWEN = Qwen2Config(
    vocab_size=151_936, hidden_size=1_536, intermediate_size=8_960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=131_072,
)  # fmt: skip
"""Qwen2.5-1.5B."""


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(gigabytes)`: a GPU with so much memory, all of it free."""

    def install(gigabytes: float) -> None:
        size = int(gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (size, size))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")

    return install


def refusal(*args, **more) -> str:
    with pytest.raises(UserError) as error:
        check_memory(*args, **more)
    text = str(error.value)
    assert "\n" not in text and text.startswith("too little memory: training needs at least"), text
    return text


def test_the_parts_and_what_would_fit_are_named(gpu):
    gpu(60)
    text = refusal(QWEN, GPU, OptimSettings(precision="bfloat16"), 16_384, reference=True)
    assert "weights 3.1, masters 6.2, gradients 6.2, moments 12.3, reference 3.1, activations" in text
    assert "60.0 GB are free on NVIDIA Test" in text
    assert text.endswith("it would fit with --optim.recompute or --micro-tokens 8192")
    for flags in ({"recompute": True}, {}):
        optim = OptimSettings(precision="bfloat16", **flags)
        check_memory(QWEN, GPU, optim, 16_384 if flags else 8_192, reference=True)


def test_several_settings_together_where_none_is_enough(gpu):
    gpu(24)
    text = refusal(QWEN, GPU, OptimSettings(precision="bfloat16"), 16_384)
    assert text.endswith("it would fit with --optim.recompute --optim.moments bfloat16 --micro-tokens 8192")
    optim = OptimSettings(precision="bfloat16", moments="bfloat16", recompute=True)
    check_memory(QWEN, GPU, optim, 8_192)


def test_where_no_setting_helps_the_error_tells_so(gpu):
    gpu(8)
    assert "no setting makes it fit: with --" in refusal(QWEN, GPU, OptimSettings(), 16_384)


def test_a_sleeping_vllm_takes_the_room_of_gradients_and_activations():
    optim = OptimSettings(precision="bfloat16", recompute=True)
    alone = Need(QWEN, optim, 16_384)
    resting = alone.parts()["gradients"] + alone.parts()["activations"]
    for vllm in (resting // 2, 3 * resting):
        awake = Need(QWEN, optim, 16_384, vllm=vllm)
        asleep = Need(QWEN, optim, 16_384, vllm=vllm, sleeps=True)
        assert awake.total() == alone.total() + vllm
        assert asleep.total() == max(alone.total(), alone.total() - resting + vllm)


def test_what_is_advised_fits():
    """Whatever the memory: by itself where one setting is enough."""
    seen = set()
    for free in range(int(10e9), int(120e9), int(2e9)):
        for sleeps in (False, True):
            need = Need(QWEN, OptimSettings(), 16_384, True, int(30e9), sleeps)
            if need.total() > free:
                text = need.advice(free, int(80e9))
                fits = {flag: less.total() <= free for flag, less in need.lighter(free, int(80e9))}
                if any(fits.values()):
                    assert {flag for flag in fits if flag in text} == {flag for flag in fits if fits[flag]}
                seen.add((any(fits.values()), text.partition(" --")[0].partition(":")[0]))
    assert seen == {
        (True, "it would fit with"),
        (False, "it would fit with"),
        (False, "no setting makes it fit"),
    }


def test_vllms_share_can_be_lowered(gpu):
    gpu(80)
    optim = OptimSettings(precision="bfloat16", recompute=True)
    rollout = RolloutSettings(engine="vllm", vllm=VllmSettings(gpu_memory=0.9, sleep="off"))
    text = refusal(QWEN, GPU, optim, 16_384, reference=True, rollout=rollout)
    assert "vLLM 72.0" in text and "--rollout.vllm.sleep on" not in text.split("it would fit")[0]
    less = float(re.search(r"--rollout.vllm.gpu-memory (\S+)", text)[1])
    fits = RolloutSettings(engine="vllm", vllm=VllmSettings(gpu_memory=less, sleep="off"))
    check_memory(QWEN, GPU, optim, 16_384, reference=True, rollout=fits)
    workers = RolloutSettings(engine="vllm", workers=1, vllm=rollout.vllm)
    check_memory(QWEN, GPU, optim, 16_384, reference=True, rollout=workers)


def test_a_queue_has_a_copy_of_the_weights_a_round_and_another_type_one(gpu, monkeypatch):
    optim, weights = (
        OptimSettings(precision="bfloat16"),
        Need(QWEN, OptimSettings(), 1).parts()["weights"] // 2,
    )
    gpu(45)
    check_memory(QWEN, GPU, optim, 2_048, rollout=RolloutSettings())
    text = refusal(QWEN, GPU, optim, 2_048, rollout=RolloutSettings(), depth=4)
    assert f"queue {4 * weights / 1e9:.1f}" in text and "--staleness 0" in text
    need = Need(QWEN, optim, 2_048)
    for rollout, depth, copies in (
        (RolloutSettings(), 1, 1),
        (RolloutSettings(dtype="bfloat16"), 3, 3),
        (RolloutSettings(dtype="float32"), 0, 2),  # the engine's own, in 4 bytes
        (RolloutSettings(dtype="fp8"), 1, 1),  # the engine's own, loaded at once
        (RolloutSettings(dtype="fp8"), 2, 3),
        (RolloutSettings(engine="vllm"), 1, 0),
        (RolloutSettings(engine="vllm"), 2, 2),
        (RolloutSettings(workers=2, dtype="float32"), 4, 0),  # in memory of their own
    ):
        assert not (depth and need.beside(rollout, 80 << 30, depth).sleeps)  # it always works
        assert need.beside(rollout, 0, depth).total() - need.total() == copies * weights, (rollout, depth)


def test_an_architecture_without_known_sizes_is_not_refused(gpu):
    gpu(1e-6)
    config = QWEN.__class__()
    config.model_type = "unheard_of"
    check_memory(config, GPU, OptimSettings(), 16_384)


@pytest.mark.parametrize("preset", ["tiny", "micro"])
def test_the_small_presets_need_less_than_a_gigabyte(preset):
    for stage in STAGES:
        file = ROOT / f"configs/{preset}/{stage.name}.toml"
        if stage.name in ("pretrain", "zero", "sft", "grpo", "sft2", "grpo2") and file.exists():
            config = load(stage, file, [])
            need = Need(TINY, config.optim, CPU.micro_tokens(config), isinstance(config, GrpoSettings))
            assert need.total() < 1e9


def test_a_cpu_is_asked_for_what_its_own_layers_keep(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000)
    on_cpu, on_gpu = (Need(MOONLIGHT_16B, OptimSettings(), 4096, device=d) for d in ("cpu", "cuda"))
    assert on_cpu.total() < on_gpu.total()
    with pytest.raises(UserError, match=f"needs at least {on_cpu.total() / 1e9:.1f} GB"):
        check_memory(MOONLIGHT_16B, CPU, OptimSettings(), 4096)


def test_the_stages_refuse_before_they_load_anything(tmp_path, tokenizer, monkeypatch, capsys):
    policy = random_policy(tmp_path / "policy", tokenizer, "r1")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000)
    more = {"pretrain": [], "sft": ["--samples-from="], "grpo": []}
    for stage, flags in more.items():
        start = [] if stage == "pretrain" else ["--init-from", str(policy)]
        argv = [stage, "--config", f"{ROOT}/configs/micro/{stage}.toml", "--runs", str(tmp_path), *start]
        assert main([*argv, *flags]) == 2
        said = capsys.readouterr().err
        assert "too little memory" in said and "on this machine" in said and said.count("\n") == 1
        assert not (tmp_path / "micro" / stage).exists()


# ---- free memory


def test_free_memory_of_a_cpu_is_that_of_the_machine_or_its_container(tmp_path):
    free = free_bytes(torch.device("cpu"))
    assert free is not None and 1e8 < free < 1e14
    assert list(container_bytes(tmp_path)) == []
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 600\ninactive_file 100\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert list(container_bytes(tmp_path)) == [400]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(container_bytes(tmp_path)) == []
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("2000\n")
    (old / "memory.usage_in_bytes").write_text("500\n")
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    assert list(container_bytes(tmp_path)) == [1550]
