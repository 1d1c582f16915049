"""`python3 -m tests.gpu` without a GPU: how it runs its checks, and each check in small.

A check runs with the CPU in the GPU's place, and on the fake GPU, where neither Triton nor memory between
processes exists: the kernels' check runs in Triton's interpreter (tests/model/triton_cases.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from model.kernels.fp8 import gemm
from pipeline.settings.common import to_dict
from tests.conftest import ROOT
from tests.gpu import __main__ as gpu_check
from tests.gpu import checks, child
from tests.gpu.checks import attention, compare, engine, network, zero
from tests.gpu.fake_cuda import fake_cuda
from tests.gpu.fake_tensor import Cuda

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = replace(
    compare.SMALL,
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
)
QWEN = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


POPEN = subprocess.Popen


class Killed(BaseException):
    """In place of a kill -9."""


def killed_here(config, step):
    """As `zero.killed`, without a process of its own: the fake GPU ends at this one."""
    log = zero.RunDir.log

    def logged(run_dir, at, total, metrics):
        log(run_dir, at, total, metrics)
        if at == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(zero.RunDir, "log", logged)
        zero.stage(config)


SIZES = {
    "machine": {"size": 64, "copied": 1 << 16},
    "network": {"config": SMALL},
    "attention": {
        "shapes": (attention.Shape(4, 2, 16, 16), attention.Shape(2, 2, 24, 16)),
        "uneven": (1, 7, 24),
        "rows": ((8,) * 4, (16,) * 2),
    },
    "syncs": {"config": SMALL, "lengths": (5, 17, 40, 8), "micro_tokens": 48},
    "engine": {"config": SMALL, "new_tokens": 6},
    "zero": {"kill": killed_here, "prompts_per_step": 2, "group_size": 2, "max_tokens": 8},
    "policy": {"sizes": QWEN, "sequences": (16,) * 8, "micro_tokens": 64, "long": 100},
    "logprobs": {"tokens": 40, "hidden_size": 16, "vocab_size": 97, "chunks": (1 << 10, 1 << 20)},
    "transport": {"shapes": [(97, 8), (8, 8), (3, 5)], "bucket_bytes": 1 << 9},
    "fp8_layers": {"config": replace(SMALL, hidden_size=136), "tokens": 300},
    "fp8_rollouts": {"config": SMALL, "prompts_per_step": 2, "group_size": 2, "max_tokens": 12},
    "moe": {"config": SMALL, "steps": 2, "sequences": 2, "tokens": 24, "timed": (2, 24)},
    "decode": {"config": SMALL, "batches": (2,), "contexts": (8,), "tokens": 4},
}
"""Arguments of each check in small."""
NOT_ON_A_CPU = {"machine", "fp8_kernels"}
"""It asks the GPU alone; Triton."""
NOT_ON_THE_FAKE_GPU = {"fp8_kernels", "fp8_layers", "transport"}
"""Triton; `scaled_mm`; memory between processes."""
ON_THE_FAKE_GPU = {"moe": {"precisions": ("bfloat16",)}}


def missed(result):
    """Claims that do not hold; speed and memory of a CPU are no claims."""
    agreement = ("relative", "(1 = yes)")
    return [c for c in result["claims"] if c.get("unit") in agreement and not compare.holds(c)]


@pytest.mark.parametrize("name", [name for name in gpu_check.CHECKS if name not in NOT_ON_A_CPU])
def test_a_check_holds_where_the_gpu_is_the_cpu(name):
    result = import_module(f"tests.gpu.checks.{name}").run(CPU, **SIZES[name])
    assert result["claims"] and not missed(result)
    json.dumps(result, default=str)


def emulated(name):
    """In place of a kernel of `model.kernels.fp8.cuda`: its emulation on a CPU."""

    def work(*args):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            out = getattr(gemm, name)(*tree_map_only(Cuda, lambda x: x.elem, args))
        return tree_map_only(torch.Tensor, Cuda, out)

    return work


@pytest.mark.parametrize("name", [name for name in gpu_check.CHECKS if name not in NOT_ON_THE_FAKE_GPU])
def test_a_check_holds_on_the_fake_gpu(name, monkeypatch):
    products = ("quantize", "multiply", "multiply_grouped", "weight_gradient", "weight_gradient_grouped")
    kernels = SimpleNamespace(**{f"{product}_gpu": emulated(product) for product in products})
    monkeypatch.setattr(gemm, "_gpu", lambda: kernels)
    sizes = SIZES[name] | ON_THE_FAKE_GPU.get(name, {})
    with fake_cuda() as found:
        result = import_module(f"tests.gpu.checks.{name}").run(GPU, **sizes)
    assert result["claims"] and not missed(result)
    assert not found.mixed and not found.captured, found.report()


def test_a_run_is_killed_for_real(tmp_path):
    model = tmp_path / "model"
    zero.random_policy(model, zero.train_tokenizer(zero.CORPUS, 400), "r1-zero-short")
    config = zero.settings(model, tmp_path, "cut", "cpu", "float32")
    zero.killed(config, 2)
    assert [line["step"] for line in zero.metrics(tmp_path / "cut" / "zero")] == [1, 2]


def test_every_check_is_listed_with_its_seconds_and_they_fit():
    files = {file.stem for file in (ROOT / "tests/gpu/checks").glob("*.py")} - {"__init__", "compare"}
    assert files == set(gpu_check.CHECKS) and sum(gpu_check.CHECKS.values()) <= 480
    assert all(import_module(f"tests.gpu.checks.{name}").SUMMARY for name in files)
    assert set(SIZES) | {"fp8_kernels"} == files


def test_checks_need_no_more_than_a_model_does():
    """A GPU machine may have torch, transformers and what they bring, and nothing else."""
    absent = [
        "tyro",
        "pydantic",
        "rich",
        "tomli_w",
        "trl",
        "jinja2",
        "matplotlib",
        "math_verify",
        "vllm",
        "ray",
    ]
    code = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"no {{name}} here", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {absent} else found(name, *rest)
from importlib import import_module
for name in {sorted(set(gpu_check.CHECKS) - {"fp8_kernels"})}:
    import_module("tests.gpu.checks." + name)
import_module("tests.gpu.__main__")
from tests.gpu.checks import zero
from pathlib import Path
import tempfile
folder = Path(tempfile.mkdtemp())
zero.random_policy(folder / "model", zero.train_tokenizer(zero.CORPUS, 400), "r1-zero-short")
print(zero.stage(zero.settings(folder / "model", folder, "bare", "cpu", "float32")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_writer_of_configs_writes_toml():
    config = zero.settings(ROOT / "m", ROOT / "r", "n", "cpu", "bfloat16")
    table = {k: v for k, v in to_dict(config).items() if k not in ("resume", "runs")}
    read = tomllib.loads(checks.toml(table))
    assert read == json.loads(json.dumps(table, default=str)) and read["optim"]["precision"] == "bfloat16"


# ---- how checks are run


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    said = capsys.readouterr()
    assert "no GPU" in said.err and said.err.count("\n") == 1 and not said.out
    assert gpu_check.main(["fp8_kernel"]) == 2
    assert "fp8_kernels" in capsys.readouterr().err


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(NAME=code, ...)`: a GPU, and these checks, programs whose `done(claims)` writes a result."""

    def install(**programs):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Made-Up 80GB")
        monkeypatch.setattr(gpu_check, "CHECKS", dict.fromkeys(programs, 1))

        def popen(command, **options):
            name, file = command[-2:]
            write = "import json, os, sys, time\ndef done(claims):\n    open(sys.argv[1], 'w').write("
            write += "json.dumps({'claims': claims}))\n"
            return POPEN([sys.executable, "-c", write + programs[name], file], **options)

        monkeypatch.setattr(gpu_check.subprocess, "Popen", popen)

    return install


def test_results_that_cannot_be_written_are_refused_before_the_first_check(scripted, tmp_path, capsys):
    scripted(never="open('never', 'w')")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below"):
        assert gpu_check.main(["--out", str(out)]) == 2
        text = capsys.readouterr().err
        assert text.startswith(f"error: --out {out} cannot be written: ") and text.count("\n") == 1


FINE = "done([{'claim': 'fine', 'value': 1.0, 'at_least': 1.0}])"


def test_results_are_written_as_they_come_and_a_crash_stops_nothing(scripted, tmp_path, capsys):
    low = FINE.replace("1.0,", "0.5,")
    scripted(good=FINE, crash="print('no kernel image', flush=True); os.abort()", off=low, last=FINE)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["check"] for line in lines] == ["good", "crash", "off", "last"]
    assert "no kernel image" in lines[1]["log"] and "exit code -6" in lines[1]["claims"][0]["claim"]
    said = capsys.readouterr().out
    assert "2 of 4 checks hold" in said and "missed: crash off" in said
    kept = json.loads((tmp_path / "gpu-made-up-80gb.json").read_text())
    assert kept["gpu"] == "NVIDIA Made-Up 80GB" and list(kept["checks"]) == ["good", "crash", "off", "last"]


def test_a_second_call_runs_the_named_and_keeps_the_rest(scripted, tmp_path):
    scripted(one=FINE, two="raise SystemExit(3)")
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    scripted(one="raise SystemExit(3)", two=FINE)
    assert gpu_check.main(["--out", str(tmp_path), "two"]) == 0
    found = json.loads((tmp_path / "gpu-made-up-80gb.json").read_text())["checks"]
    assert all(compare.holds(claim) for name in ("one", "two") for claim in found[name]["claims"])


def test_what_hangs_is_killed_with_all_that_it_started(scripted, tmp_path):
    note = tmp_path / "pid"
    hangs = f"""
import subprocess
with open({str(note)!r}, "w") as file:
    file.write(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""
    scripted(hangs=hangs, then=FINE)
    assert gpu_check.main(["--out", str(tmp_path), "--seconds", "30"]) == 1
    result = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert "still running" in result["claims"][0]["claim"]
    for _ in range(100):  # the system takes a moment to clear it away
        try:
            os.kill(int(note.read_text()), 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what the check had started lives on")


def test_the_rest_is_skipped_by_name_when_time_is_short(scripted, tmp_path, capsys):
    scripted(first=FINE, second=FINE)
    assert gpu_check.main(["--out", str(tmp_path), "--seconds", "0.5"]) == 1
    assert "skipped: first second" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu-made-up-80gb.json").read_text())["checks"] == {}


def test_a_child_records_what_its_check_raises(monkeypatch, tmp_path):
    def broken(device):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(network, "run", broken)
    with fake_cuda():
        child.main("network", str(tmp_path / "network.json"))
    result = json.loads((tmp_path / "network.json").read_text())
    assert "no kernel image" in result["claims"][0]["claim"] and "Traceback" in result["log"]
    assert result["gpu"].startswith("NVIDIA") and not compare.holds(result["claims"][0])


# ---- what checks find


def test_a_network_that_differs_is_found_out(monkeypatch):
    rotate = network.Transformer.hidden

    def off(self, token_ids, *args, **kwargs):
        return rotate(self, token_ids, *args, **kwargs) * (1.01 if self is not first[0] else 1.0)

    first = []
    start = network.Transformer.__init__

    def remember(self, *args, **kwargs):
        first.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(network.Transformer, "__init__", remember)
    monkeypatch.setattr(network.Transformer, "hidden", off)
    claims = [claim["claim"] for claim in missed(network.run(CPU, config=SMALL))]
    assert "fp32: logits" in claims and "fp32: absorbed decoding, full forward" in claims


def test_a_wait_in_a_micro_batch_is_found_out(monkeypatch):
    syncs = import_module("tests.gpu.checks.syncs")
    hidden = syncs.Transformer.hidden

    def waits(self, *args, **kwargs):
        states = hidden(self, *args, **kwargs)
        assert float(states.sum()) != 0
        return states

    monkeypatch.setattr(syncs.Transformer, "hidden", waits)
    with fake_cuda():
        result = syncs.run(GPU, **SIZES["syncs"])
    assert {name.partition(":")[0] for name in result["waits"]} == {"native", "native, recomputed"}
    assert len(missed(result)) == 2


def test_a_resume_that_goes_astray_is_found_out():
    one = [{"step": 1, "loss": 1.0, "time/step_s": 1.0}, {"step": 2, "loss": 0.5}]
    assert zero.apart(one, [dict(one[0], **{"time/step_s": 9.0}), one[1]]) == 0
    assert zero.apart(one, [one[0], {"step": 2, "loss": 0.51}]) == pytest.approx(0.02)
    assert zero.apart(one, one[:1]) == zero.apart(one, [one[0], {"step": 2}]) == float("inf")


def test_what_is_not_comparable_is_infinitely_far():
    x = torch.ones(3)
    assert compare.relative(x, x) == 0 and compare.relative(1.5 * x, x) == pytest.approx(0.5)
    assert compare.relative(torch.ones(4), x) == float("inf")
    assert compare.relative(x * float("nan"), x) == float("inf")
    nothing = {"claim": "", "value": float("nan")}
    assert not compare.holds(nothing | {"at_most": 1.0}) and not compare.holds(nothing | {"at_least": 1.0})
    assert engine.SUMMARY
