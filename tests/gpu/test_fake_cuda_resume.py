"""A checkpoint goes from a GPU to a CPU and back, and a GPU that resumes holds nothing twice."""

from __future__ import annotations

import pytest

from pipeline.run.directory import open_run
from pipeline.settings.common import OptimSettings, StageSettings
from pipeline.table import Stage
from pipeline.train.learner import Learner
from pipeline.train.pack import pack
from pipeline.train.supervised import load_state, save_state
from tests.gpu.fake_cuda import fake_cuda
from tests.gpu.test_fake_cuda_training import EVERY, LENGTHS, examples, policy

TOY = Stage("toy", StageSettings, "toy", "a toy")
OPTIM = {
    "float32": OptimSettings(lr=1e-3),
    "bfloat16": OptimSettings(lr=1e-3, precision="bfloat16", moments="bfloat16"),
}
BATCH = pack(list(examples(LENGTHS)), 64)


def begun(kind, optim, device) -> Learner:
    return Learner(policy(kind).to(device), optim, 10, **EVERY)


@pytest.mark.parametrize("kind", ["native", "dense"])
@pytest.mark.parametrize("precision", OPTIM)
def test_a_checkpoint_opens_on_any_device(kind, precision, tmp_path):
    """Saved on one after an update, taken over by a learner on the other: the next update is the same."""
    optim, losses = OPTIM[precision], []
    with fake_cuda() as found:
        for first, then in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
            with open_run(TOY, StageSettings(runs=tmp_path, name=f"{first}-{then}"), "toy") as run:
                learner = begun(kind, optim, first)
                learner.supervised_update(BATCH)
                save_state(run, 1, learner.state_dict())
                learner = begun(kind, optim, then)
                found.clear()
                learner.load_state_dict(load_state(run)[1])
                assert found.peak <= 1.05 * found.live, "a second copy of something lay on the GPU"
                losses.append(learner.supervised_update(BATCH)["loss/lm"])
    assert not found.mixed, found.report()
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4 if precision == "float32" else 0.05)
    assert {param.device.type for param in learner.policy.parameters()} == {"cuda"}
