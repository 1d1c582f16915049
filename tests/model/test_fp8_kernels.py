"""The Triton kernels: against the plain code in Triton's interpreter, and compiled without a GPU for one.

The interpreter must be chosen before anything imports Triton, so each has a process of its own.
"""

import json
import os
import subprocess
import sys


def python(root, *args, **env):
    """A Python process in the checkout, without a GPU, that must succeed: its standard output."""
    env = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", **env}
    command = [sys.executable, *args]
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_triton_kernels_equal_the_plain_code(root):
    printed = python(root, "-m", "pytest", "-x", "tests/model/triton_cases.py", TRITON_INTERPRET="1")
    assert "35 passed" in printed, printed[-500:]


def test_triton_kernels_compile_for_hopper_to_its_fp8_tensor_cores(root, tmp_path):
    printed = python(
        root, "-m", "tests.model.triton_compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)
    )
    built = [json.loads(line) for line in printed.splitlines()]
    assert [b["kernel"] for b in built] == [
        "_tiles",
        "_tiles",
        "_blocks",
        "_rows_times_experts",
        "_over_tokens",
        "_log_softmax",
        "_logits_gradient",
    ]
    for b in built:
        assert b["binary_bytes"] > 0 and not b["spills"], b
        assert b["shared_bytes"] <= 227 * 1024, b
        if b["kernel"] in ("_tiles", "_blocks"):
            assert b["casts"] == ["cvt.rn.satfinite.e4m3x2.f32"], b
            assert b["divisions"] == ["div.rn.f32"], (
                b
            )  # as a CPU rounds: approximate division is off by a bit
        elif b["kernel"] in ("_log_softmax", "_logits_gradient"):
            assert b["logits"] == ["ld.global.v4.b32"], b  # 16 bytes at a time
        else:
            assert b["products"] == ["wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"], b
