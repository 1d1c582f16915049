"""Which networks decode from CUDA graphs. What graphs compute: tests/gpu/checks/engine.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from model.scale import fp8
from model.transformer import Transformer
from rollout.native.graphs import capturable
from tests.small import tiny


class OnGpu:
    """A network's modules, with an embedding that says it lies on a GPU."""

    def __init__(self, net: Transformer, dtype: torch.dtype) -> None:
        self.modules = net.modules
        weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
        self.embed_tokens = SimpleNamespace(weight=weight)


@pytest.fixture
def net():
    return Transformer(tiny(97), seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_captured_on_a_cpu(net, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not capturable(net.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.bfloat16, (9, 0), True),  # Hopper
        (torch.bfloat16, (10, 0), True),  # Blackwell
        (torch.bfloat16, (8, 0), False),  # Ampere: torch's grouped product copies row counts to the host
        (torch.bfloat16, (12, 0), False),
        (torch.float32, (9, 0), False),
        (torch.float16, (9, 0), False),
    ],
)
def test_bf16_is_captured_where_a_grouped_product_is_one_kernel(
    net, dtype, capability, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert capturable(OnGpu(net, dtype)) is expected


def test_fp8_experts_are_not_captured(net, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.convert(net) > 0
    assert not capturable(OnGpu(net, torch.bfloat16))
