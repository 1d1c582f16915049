"""`make gpu-check` without a GPU: one line and exit code 2; and its checks run, the CPU in the GPU's place.

The kernels' check runs in Triton's interpreter: tests/model/triton_cases.py.
"""

import json
from dataclasses import replace

import pytest
import torch

from tests.bench import measure
from tests.bench.__main__ import holds
from tests.gpu import __main__ as gpu_check
from tests.gpu.checks import attention, compare, engine, fp8_layers, logprobs, network, speed

CPU = torch.device("cpu")
SMALL = replace(
    compare.SMALL,
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    said = capsys.readouterr()
    assert "no GPU" in said.err and said.err.count("\n") == 1 and not said.out
    assert gpu_check.main(["fp8_kernel"]) == 2
    assert "fp8_kernels" in capsys.readouterr().err


def test_every_check_has_a_summary_and_an_order():
    assert gpu_check.names() == list(gpu_check.ORDER)
    assert all(module.SUMMARY for module in (attention, engine, fp8_layers, logprobs, network, speed))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (network, {"config": SMALL}),
        (engine, {"config": SMALL, "new_tokens": 6}),
        (fp8_layers, {"config": replace(SMALL, hidden_size=136), "tokens": 300}),
        (
            attention,
            {
                "shapes": (attention.Shape(4, 2, 16, 16), attention.Shape(2, 2, 24, 16)),
                "uneven": (1, 7, 24),
                "rows": ((8,) * 4, (16,) * 2),
            },
        ),
        (logprobs, {"tokens": 40, "hidden_size": 16, "vocab_size": 97, "chunks": (1 << 10, 1 << 20)}),
        (speed, {"config": SMALL, "rows": 2, "row_tokens": 16, "batch": 2, "context": 8}),
    ],
    ids=["network", "engine", "fp8_layers", "attention", "logprobs", "speed"],
)
def test_a_check_holds_where_the_gpu_is_the_cpu(module, arguments):
    result = module.run(CPU, **arguments)
    assert result["claims"] and not [claim for claim in result["claims"] if not holds(claim)]


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
    missed = [claim["claim"] for claim in network.run(CPU, config=SMALL)["claims"] if not holds(claim)]
    assert "fp32: logits" in missed and "fp32: absorbed decoding, full forward" in missed


def test_what_is_not_comparable_is_infinitely_far():
    x = torch.ones(3)
    assert compare.relative(x, x) == 0 and compare.relative(1.5 * x, x) == pytest.approx(0.5)
    assert compare.relative(torch.ones(4), x) == float("inf")
    assert compare.relative(x * float("nan"), x) == float("inf")


def test_results_are_written_and_a_check_that_breaks_fails_but_stops_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda device: {"gpu": "made up"})
    monkeypatch.setattr(measure, "RESULTS", tmp_path)

    def broken(device):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(network, "run", broken)
    monkeypatch.setattr(engine, "run", lambda device: {"claims": [compare.true("fine", True)]})
    assert gpu_check.main(["network", "engine"]) == 1
    failed = json.loads((tmp_path / "gpu-network.json").read_text())
    assert failed["gpu"] == "made up" and "no kernel image" in failed["claims"][0]["claim"]
    assert holds(json.loads((tmp_path / "gpu-engine.json").read_text())["claims"][0])
    assert gpu_check.main(["engine"]) == 0
    capsys.readouterr()
