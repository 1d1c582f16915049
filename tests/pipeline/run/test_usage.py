"""Tokens a second, MFU and memory: by hand, and only where they are known."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from pipeline.run.metrics import GLOSSARY
from pipeline.run.usage import Usage

CONFIG = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
PRODUCTS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
"""Weights that the layers multiply one token with."""


@pytest.fixture
def h100(monkeypatch):
    """A GPU of a known peak whose tensors took 3 GiB."""
    resets = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: resets.append(device))
    return resets


def test_mfu_is_the_equations_flops_over_the_peak(h100):
    """Two FLOPs a multiplication, the backward twice the forward, attention over what a token sees."""
    lengths = [10, 3]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    forward = 2 * (PRODUCTS * 13 + 32 * 100 * 13 + 2 * 2 * 32 * pairs)
    usage = Usage(CONFIG, torch.device("cuda"))
    got = usage.of(iter(lengths), 2.0)
    assert got["time/mfu"] == pytest.approx(3 * forward / 2.0 / 989e12, rel=1e-12)
    assert got["time/trained_tokens_per_s"] == 6.5 and got["memory/peak_gib"] == 3
    scored = usage.of(lengths, 2.0, scorings=2)
    assert scored["time/mfu"] == pytest.approx(5 * forward / 2.0 / 989e12, rel=1e-12)
    assert len(h100) == 3 and set(got) <= set(GLOSSARY)


def test_without_a_known_peak_there_is_no_mfu(h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Unheard-of")
    assert "time/mfu" not in Usage(CONFIG, torch.device("cuda")).of([4], 1.0)
    monkeypatch.undo()
    assert Usage(CONFIG, torch.device("cpu")).of([4], 2.0) == {"time/trained_tokens_per_s": 2.0}


def test_an_architecture_without_known_sizes_has_no_mfu(h100):
    config = LlamaConfig()
    config.model_type = "unheard_of"
    assert "time/mfu" not in Usage(config, torch.device("cuda")).of([4], 1.0)
