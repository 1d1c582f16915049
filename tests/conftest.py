"""What every test shares: one torch thread, the checkout, a tokenizer, the command line in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tests' models are so small that a second thread costs more than it brings."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Learned from a few lines."""
    from rollout.text.tokenizer import train_tokenizer
    from tests.small import CORPUS

    return train_tokenizer(CORPUS, vocab_size=400)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m pipeline ARGS` in a process of its own."""

    def run(*args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        command = [sys.executable, "-m", "pipeline", *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    return run
