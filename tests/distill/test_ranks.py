"""Two processes on the CPU compute what one does, write once, and save at a Ctrl-C that one of them gets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.jsonl import read_log

TEACH = """
corpus = ["{toy}/corpus.jsonl"]
init_from = "{toy}/start"
runs = "{runs}"
tokens_per_step = 256
max_length = 128
steps = 40
log_every = 1
eval_rows = 20
eval_every = 16
threads = 1
plain_control = false
device = "cpu"
[optim]
lr = 1e-2
warmup_steps = 2
"""


def start(config: Path, name: str, *flags: str) -> list[subprocess.Popen[str]]:
    """The stage as two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pipeline", "distill", "--config", str(config), "--name", name, *flags]
    return [
        subprocess.Popen(
            command,
            env=os.environ
            | together
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def test_two_processes_do_what_one_does(distill: Callable[..., Path], toy: Path, tmp_path: Path) -> None:
    config = tmp_path / "teach.toml"
    config.write_text(TEACH.format(toy=toy, runs=tmp_path))
    log = tmp_path / "two/distill/metrics.jsonl"
    ranks = start(config, "two")
    while not (log.is_file() and log.read_text()) and all(process.poll() is None for process in ranks):
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGINT)  # rank 0 does not get it
    said = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [130, 130], said
    ranks = start(config, "two", "--resume")
    said = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "40/40" in said[0] and "40/40" not in said[1]

    settings: dict[str, Any] = {"steps": 40, "eval_rows": 20, "eval_every": 16, "tokens_per_step": 256}
    one = distill(name="one", plain_control=False, **settings)
    alone, both = read_log(one / "metrics.jsonl"), read_log(log)
    assert [row["step"] for row in both] == [row["step"] for row in alone]
    for key in ("loss/lm", "heldout/loss", "optim/lr", "data/tokens", "data/epoch"):
        gaps = [abs(a[key] - b[key]) for a, b in zip(alone, both, strict=True) if key in a]
        assert gaps and max(gaps) < 1e-5, key
    mine, theirs = (load_file(run / "student/model/model.safetensors") for run in (one, log.parent))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5
    assert not any(
        torch.equal(mine[name], start) for name, start in load_file(toy / "start/model.safetensors").items()
    )


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_a_process_that_is_left_alone_stops_by_name(how: str, toy: Path, tmp_path: Path) -> None:
    """Not with a page of a collective's own; what the one that ended says is found among the lines."""
    config = tmp_path / "teach.toml"
    config.write_text(TEACH.format(toy=toy, runs=tmp_path).replace("steps = 40", "steps = 4000"))
    ranks = start(config, "one", *(["--eval-rows", "900"] if how == "refused" else []))
    log = tmp_path / "one/distill/metrics.jsonl"
    while not (log.is_file() and log.read_text()) and all(process.poll() is None for process in ranks):
        time.sleep(0.05)
    if how == "killed":
        ranks[1].kill()
    said = [process.communicate()[0] for process in ranks]
    codes = [process.returncode for process in ranks]
    assert codes == ([2, 3] if how == "refused" else [3, -9]) or codes == [2, 2], said
    assert not any("Traceback" in text for text in said)
    if how == "refused":
        assert "eval_rows=900 of 200 rows leave none to learn" in said[0]
    else:
        assert "stopped: rank 0: another process of this run has ended" in said[0]
        assert f"--config {config} --name one --resume" in said[0]


def test_other_stages_say_that_they_compute_in_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "pretrain", "--config", "configs/micro/pretrain.toml"]
    ranks = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run([*command, "--runs", tmp_path], env=ranks, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "pretrain computes in one process; start it without torchrun" in done.stderr
    )
