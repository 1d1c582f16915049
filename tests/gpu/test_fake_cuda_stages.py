"""Every stage of the chain on the fake GPU, native and dense: nothing that a GPU refuses, all of it there."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch

from model.dense import DensePolicy
from pipeline.arguments import load
from pipeline.run.directory import open_run
from pipeline.stages import reject
from pipeline.table import STAGES
from rollout.local import load_policy
from rollout.text.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.gpu.fake_cuda import fake_cuda
from tests.small import llama

FEW = "--prompts-per-step 2 --group-size 2 --pool 20 --eval-problems 2"
FLAGS = {
    "pretrain": "--steps 2 --batch-tokens 256 --checkpoint-every 1",
    "zero": f"{FEW} --steps 2 --max-tokens 8 --minibatches 2 --kl-coef 0.001 --checkpoint-every 1",
    "sft": "--curated 4 --epochs 1 --batch-tokens 256 --checkpoint-every 1 --max-samples 2",
    "grpo": f"{FEW} --steps 1 --max-tokens 10 --optim.precision bfloat16",
    "reject": "--pool 2 --prompts-per-step 2 --samples 2 --max-tokens 8",
    "eval": "--heldout-count 2 --max-tokens 8 --models base=grpo",
}
"""As few as have every part of a stage."""


def run_stage(name, runs, *flags):
    """Run it on the fake GPU; what was found."""
    stage = next(stage for stage in STAGES if stage.name == name)
    more = ["--runs", str(runs), "--device", "cuda", *FLAGS[name].split(), *flags]
    config = load(stage, ROOT / f"configs/micro/{name}.toml", more)
    with fake_cuda() as found, open_run(stage, config, f"make {name}") as run_dir:
        import_module(stage.module).run(config, run_dir)
    return copy.copy(found)


@pytest.fixture(scope="module")
def patched():
    """So few updates learn nothing; `reject` keeps what it samples all the same."""
    with pytest.MonkeyPatch.context() as patch:
        row = reject.curated_rows("general", 1, 0)[0]
        patch.setattr(reject, "keepers", lambda group, least: [row])
        yield


@pytest.fixture(scope="module")
def native(tmp_path_factory, patched):
    """What the stages of a native chain did, by name; and the folder of the runs."""
    runs = tmp_path_factory.mktemp("native")
    return runs / "micro", {name: run_stage(name, runs) for name in FLAGS}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, native, patched):
    """The same of a dense chain, whose base has random weights and the native base's tokenizer."""
    runs, first = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("base") / "model"
    DensePolicy(llama(vocab_size=420, max_position_embeddings=512)).save(first)
    load_tokenizer(native[0] / "pretrain" / "model").save_pretrained(first)
    found = {}
    for name in ("zero", "sft", "grpo", "reject", "eval"):
        begins = name in ("zero", "sft")
        found[name] = run_stage(name, runs, *(["--init-from", str(first)] if begins else []))
    return runs / "micro", found


@pytest.mark.parametrize("chain", ["native", "dense"])
def test_every_stage_runs_there(chain, request):
    folder, stages = request.getfixturevalue(chain)
    for name, found in stages.items():
        assert not found.mixed and not found.captured, f"{name}: {found.report()}"
        assert found.peak > 20_000, f"{name} computes elsewhere: {found.report()}"
        assert (folder / name / "done.json").exists()


@pytest.mark.parametrize("chain", ["native", "dense"])
def test_what_they_leave_opens_on_a_cpu(chain, request):
    folder, _ = request.getfixturevalue(chain)
    for name in ("zero", "sft", "grpo"):
        policy = load_policy(folder / name / "model")
        assert policy.logits(torch.tensor([[1, 2, 3]])).isfinite().all()
        state = folder / "zero" / "checkpoint-1" / "state.pt"
        assert torch.load(state, weights_only=True, map_location="cpu")


def test_a_stage_resumes_there(native, tmp_path):
    """`zero` stopped after its first step, then resumed, against `zero` in one go."""
    folder, _ = native
    start = ["--init-from", str(folder / "pretrain" / "model"), "--name", "again"]
    stage = import_module("pipeline.stages.grpo")
    with pytest.MonkeyPatch.context() as patch:
        log = stage.RunDir.log

        def stopped(run_dir, step, total, metrics):
            if step == 2:
                raise KeyboardInterrupt
            log(run_dir, step, total, metrics)

        patch.setattr(stage.RunDir, "log", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_stage("zero", tmp_path, *start)
    found = run_stage("zero", tmp_path, *start, "--resume")
    assert not found.mixed, found.report()
    both = (load_policy(path / "zero" / "model") for path in (folder, tmp_path / "again"))
    for one, other in zip(*(policy.parameters() for policy in both), strict=True):
        assert torch.equal(one, other)
