"""The Triton kernels against the plain code, in Triton's interpreter.

The interpreter must be chosen before anything imports Triton, so the cases have a process of their own.
"""

import os
import subprocess
import sys


def test_triton_kernels_equal_the_plain_code(root):
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-x", "tests/model/triton_cases.py"]
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "14 passed" in done.stdout, done.stdout[-500:]
