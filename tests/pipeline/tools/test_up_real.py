"""`up` with a real stage."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_ctrl_c_to_up_alone_reaches_a_real_stage_which_saves(tmp_path):
    """The real thing: `pretrain` of the micro preset saves where it is, and `--resume` finds it."""
    line = [sys.executable, "-m", "pipeline", "up", "zero", "--preset", "micro", "--runs", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        metrics = tmp_path / "micro/pretrain/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Ctrl-C: finishing this step" in out and "everything is saved" in out and "Traceback" not in out
    assert (tmp_path / "micro/pretrain/latest").exists() and not (tmp_path / "micro/zero").exists()
