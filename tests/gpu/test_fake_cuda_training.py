"""Updates on the fake GPU: the CPU's numbers, no wait inside a micro-batch, no tensor of s x s."""

from __future__ import annotations

import random

import pytest
import torch

from model.dense import DensePolicy
from model.kernels.packed import Packed, unfold
from model.transformer import Transformer
from pipeline.settings.common import OptimSettings
from pipeline.train.learner import Learner, PolicyObjective, score
from pipeline.train.losses import loss_named
from pipeline.train.pack import Example, pack
from tests.gpu.fake_cuda import fake_cuda
from tests.small import llama, tiny

OBJECTIVE = PolicyObjective(
    loss_named("grpo"), {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.001}, temperature=0.9
)
LENGTHS = (40, 17, 23, 9, 31, 12, 60, 5)
MOST_WAITS = 4
"""Of the host, an update."""
EVERY = {"mtp_coef": 0.3}
"""What a learner of both kinds takes."""


def policy(kind, positions=64):
    if kind == "dense":
        return DensePolicy(llama(max_position_embeddings=positions)).train()
    config = tiny(97, num_nextn_predict_layers=1, max_position_embeddings=positions)
    return Transformer(config, seed=0).train()


def examples(lengths):
    rng = random.Random(0)
    for n in lengths:
        weights, logprobs = [0.0] * 3 + [1 / 100] * (n - 3), [-rng.random() for _ in range(n)]
        ids = [rng.randrange(3, 97) for _ in range(n)]
        yield Example(ids, weights, logprobs, rng.choice([-1.0, 1.0]))


def updates(kind, device, precision="float32", micro_tokens=64, **optim):
    """Metrics and weights of one supervised and two policy updates."""
    net = policy(kind).to(device)
    settings = OptimSettings(lr=1e-3, precision=precision, **optim)
    learner, reference = Learner(net, settings, 10, **EVERY), net.frozen()
    batch = pack(list(examples(LENGTHS)), micro_tokens)
    old = [score(net, part, 0.9) for part in batch.micro_batches(device)]
    found = [
        learner.supervised_update(batch),
        learner.policy_update(batch, OBJECTIVE, old, reference),
        learner.policy_update(batch, OBJECTIVE, None, None),
    ]
    return found, torch.cat([p.detach().flatten().float().cpu() for p in net.parameters()])


@pytest.mark.parametrize(
    ("kind", "precision", "optim"),
    [
        ("native", "float32", {"balance_alpha": 1e-3, "router_bias_gamma": 1e-3}),
        ("native", "bfloat16", {"moments": "bfloat16", "beta2": 0.95}),
        ("native", "float32", {"recompute": True}),
        ("dense", "float32", {}),
        ("dense", "bfloat16", {"recompute": True}),
    ],
)
def test_updates_are_those_of_the_cpu(kind, precision, optim):
    want, weights = updates(kind, "cpu", precision, **optim)
    with fake_cuda() as found:
        got, on_gpu = updates(kind, "cuda", precision, **optim)
        on_gpu = on_gpu.clone()
    assert not found.mixed and not found.captured, found.report()
    near = 1e-4 if precision == "float32" else 0.05
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=near, abs=near)
    # AdamW's first steps have the size of the learning rate wherever a gradient's sign is rounding.
    assert (on_gpu - weights).abs().mean() < (2e-6 if precision == "float32" else 2e-3)


@pytest.fixture
def learner(request):
    """On the fake GPU, its tables filled by a first update; and what is counted."""
    kind, precision, optim = request.param
    with fake_cuda() as found:
        net = policy(kind).to("cuda")
        made = Learner(net, OptimSettings(lr=1e-3, precision=precision, **optim), 10, **EVERY)
        made.supervised_update(pack(list(examples(LENGTHS)), 64))
        yield made, found


QUIET = pytest.mark.parametrize(
    "learner",
    [
        ("native", "bfloat16", {"balance_alpha": 1e-3}),
        ("native", "bfloat16", {"recompute": True}),
        ("dense", "bfloat16", {}),
        ("dense", "float32", {"recompute": True}),
    ],
    indirect=True,
    ids=str,
)


@QUIET
def test_an_update_waits_a_few_times_however_many_micro_batches_it_has(learner):
    made, found = learner
    reference = made.policy.frozen()
    counts, parts = set(), set()
    for micro_tokens in (1000, 32):
        batch = pack(list(examples(LENGTHS)), micro_tokens)
        parts.add(len(batch.parts))
        old = [score(made.policy, part, 0.9) for part in batch.micro_batches(made.device)]
        for update in (
            lambda b=batch: made.supervised_update(b),
            lambda b=batch, o=old: made.policy_update(b, OBJECTIVE, o, reference),
        ):
            found.clear()
            update()
            assert sum(found.syncs.values()) <= MOST_WAITS and not found.uploads, found.report()
            counts.add(sum(found.syncs.values()))
    assert min(parts) == 1 and max(parts) > 5
    assert len(counts) == 1, f"waits depend on the number of micro-batches: {counts}"


@QUIET
def test_scoring_does_not_wait(learner):
    made, found = learner
    batch = pack(list(examples(LENGTHS)), 64)
    parts = list(batch.micro_batches(made.device))
    found.clear()
    for part in parts:
        score(made.policy, part, 0.9)
    assert not found.syncs and not found.uploads, found.report()


@pytest.mark.parametrize("lengths", [(256,) * 16, (4096,)])
@pytest.mark.parametrize(
    ("kind", "precision"), [("native", "bfloat16"), ("dense", "bfloat16"), ("dense", "float32")]
)
def test_no_tensor_of_a_long_row_is_s_x_s(kind, precision, lengths):
    with fake_cuda() as found:
        net = policy(kind, positions=4096).to("cuda")
        made = Learner(net, OptimSettings(lr=1e-3, precision=precision), 10)
        batch = pack(list(examples(lengths)), 4096)
        assert len(batch.parts) == 1
        found.clear()
        made.policy_update(batch, OBJECTIVE, None, None)
    assert not found.mixed
    assert found.largest[0] < 4096**2 / 2, found.report()  # bytes: a mask has 1 or more a pair


def test_shared_prompts_have_the_cpus_gradient():
    """A GPU adds up the copies of a prompt in one launch, a CPU copy by copy."""
    x, dy = torch.randn(10, 2, 3), torch.randn(14, 2, 3)
    found = []
    for device in ("cpu", "cuda"):
        with fake_cuda():
            packed = Packed.of([4, 3, 5, 2], device, prefixes=[0, 2, 2, 0])
            given = x.to(device).requires_grad_()
            (gradient,) = torch.autograd.grad(unfold(given, packed), given, dy.to(device))
            found.append(gradient.cpu())
    torch.testing.assert_close(*found)
