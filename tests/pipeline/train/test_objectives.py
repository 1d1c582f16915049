"""Each objective with each correction against loops in float64, and against TRL on the same tensors."""

import inspect
import itertools
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from pipeline.settings.rollouts import CorrectionSettings
from pipeline.train.correction import correction, over_rollouts
from pipeline.train.losses import LOSSES, Tokens, k3
from pipeline.train.pack import rollout_weights
from tests.reference.objectives import SEQUENCE_TO_MEAN, objective

LENGTHS = [1, 7, 2, 13, 3, 5]
CORRECTIONS = {
    f"{level} {treatment}": CorrectionSettings(level=level, treatment=treatment, low=0.8, high=1.3)
    for level, treatment in itertools.product(("token", "sequence", "geometric"), ("truncate", "mask"))
} | {"default": CorrectionSettings(), "engine": CorrectionSettings(anchor="engine")}
SETTINGS = {"clip_low": 0.3, "clip_high": 0.5, "kl_coef": 0.04, "kl_estimator": "k3"}
EXTRAS = {"plain": {}, "dual clip": {"dual_clip": 1.5}, "unbiased": {"kl_estimator": "unbiased"}}
CASES = [
    (loss, bounds, extra)
    for loss, bounds, extra in itertools.product(LOSSES, CORRECTIONS, EXTRAS)
    if extra != "dual clip" or loss not in ("gspo", "cispo")
]


def made(dtype=torch.double):
    """Log-probabilities of the current policy, the old one, the engine and the reference (4 n), and an
    advantage a rollout. Each clip and bound bites for some tokens and some rollouts, not for others."""
    torch.manual_seed(0)
    lens, noise = torch.tensor(LENGTHS), torch.randn(2, sum(LENGTHS), dtype=torch.double)
    means = torch.tensor([[1.0, -0.8, 0.2, 0.6, -0.6, 0.1], [0.8, 0.02, -0.4, 0.1, -0.1, -0.02]])
    means = means.double().repeat_interleave(lens, 1)
    centred = [part - part.mean(1, keepdim=True) for part in noise.split(LENGTHS, 1)]
    drift, gap = means + torch.cat(centred, 1) * torch.tensor([[0.8], [0.3]])
    old, ref = -1 - 2 * torch.rand(2, sum(LENGTHS), dtype=torch.double)
    advantages = torch.tensor([1.3, -0.7, 0.9, -1.1, 0.4, -0.2], dtype=dtype)
    return torch.stack([old + drift, old, old - gap, ref]).to(dtype), advantages


def value(loss, new, logprobs, advantages, bounds, settings):
    """The loss as an update computes it, with its metrics and what the correction changed."""
    old, engine, ref = logprobs[1:]
    old = engine if bounds.anchor == "engine" else old
    lens = torch.tensor(LENGTHS)
    rollout = torch.arange(len(LENGTHS)).repeat_interleave(lens)
    ratio, outside = correction(old, engine, rollout, len(LENGTHS), bounds)
    weights = torch.tensor(rollout_weights(LENGTHS, LOSSES[loss].per, SEQUENCE_TO_MEAN), dtype=new.dtype)
    each = advantages.repeat_interleave(lens) * ratio
    tokens = Tokens(new, old, engine, ref, each, weights.repeat_interleave(lens), rollout, len(LENGTHS))
    return *LOSSES[loss](tokens, **settings), outside


@pytest.mark.parametrize(("loss", "bounds", "extra"), CASES)
def test_value_and_gradient_are_those_of_a_loop_in_float64(loss, bounds, extra):
    logprobs, advantages = made()
    bounds, extra = CORRECTIONS[bounds], EXTRAS[extra]
    settings = SETTINGS | extra
    new = logprobs[0].clone().requires_grad_()
    got, metrics, outside = value(loss, new, logprobs, advantages, bounds, settings)
    held = [part.tolist() for part in logprobs[0].split(LENGTHS)]
    how = (bounds.level, bounds.treatment, bounds.low, bounds.high, bounds.anchor)

    def loop(current):
        rows = torch.stack([current, *logprobs[1:]], 1).split(LENGTHS)
        rollouts = list(zip(advantages.tolist(), [row.tolist() for row in rows], strict=True))
        dual, estimator = extra.get("dual_clip", 0.0), extra.get("kl_estimator", "k3")
        given = {"low": 0.3, "high": 0.5, "dual": dual, "beta": 0.04, "estimator": estimator}
        return -objective(loss, rollouts, held, how, **given)

    assert got.item() == pytest.approx(loop(logprobs[0]), rel=1e-12, abs=1e-14)
    (gradient,) = torch.autograd.grad(got, new)
    step = 1e-6 * torch.eye(len(new), dtype=torch.double)
    slopes = [(loop(logprobs[0] + h) - loop(logprobs[0] - h)) / 2e-6 for h in step]
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.double), rtol=1e-7, atol=1e-9)
    assert 0 < metrics["loss/clip_frac"] < 1
    assert outside.any() == (bounds.anchor == "old") and not outside.all()


def test_each_setting_changes_some_case():
    """The cases above reach what they are for."""
    logprobs, advantages = made()
    found = set()
    for loss, bounds, extra in CASES:
        settings = SETTINGS | EXTRAS[extra]
        got, _, _ = value(loss, logprobs[0], logprobs, advantages, CORRECTIONS[bounds], settings)
        found.add(f"{got.item():.12g}")
    assert len(found) == len(CASES)


def test_sums_and_means_are_over_each_rollout_alone_whatever_its_length():
    """Of 4 rollouts one has a single token, one has none, and one is longer than fp32 can add up."""
    few = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    rollout = torch.tensor([0, 2, 2, 2])
    assert over_rollouts(few, rollout, 4, mean=False).tolist() == [1, 14, 14, 14]
    mean = over_rollouts(few, rollout, 4, mean=True)
    torch.testing.assert_close(mean, torch.tensor([1, 14 / 3, 14 / 3, 14 / 3]))
    (gradient,) = torch.autograd.grad(mean[1], few)
    torch.testing.assert_close(gradient, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))
    many = torch.full((200_000,), 0.1)
    assert (over_rollouts(many, torch.zeros(200_000, dtype=torch.long), 1, mean=True) == many).all()


# ---- the KL estimators in closed form


@pytest.mark.parametrize("old_is_current", [True, False])
def test_the_unbiased_estimator_has_the_gradient_of_the_kl(old_is_current):
    """Over a softmax of 9 tokens, every one weighted by its probability under the policy that sampled."""
    torch.manual_seed(0)
    logits = torch.randn(9, dtype=torch.double, requires_grad=True)
    p, q = logits.log_softmax(0), torch.randn(9, dtype=torch.double).log_softmax(0)
    old = p.detach() if old_is_current else torch.randn(9, dtype=torch.double).log_softmax(0)
    rows, zeros = torch.arange(9), torch.zeros(9, dtype=torch.double)

    def of_loss(estimator):
        tokens = Tokens(p, old, old, q, zeros, old.exp(), rows, 9)
        loss, metrics = LOSSES["grpo"](
            tokens, clip_low=0.2, clip_high=0.2, kl_coef=1.0, kl_estimator=estimator
        )
        return metrics["loss/kl_ref"], torch.autograd.grad(loss, logits, retain_graph=True)[0]

    kl, back = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    wanted, other = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (kl, back))
    measured, gradient = of_loss("unbiased")
    torch.testing.assert_close(measured, kl.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
    if old_is_current:  # k3's gradient is that of the other direction
        torch.testing.assert_close(of_loss("k3")[1], other, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(other, wanted)
    else:
        assert not torch.isclose((old.exp() * k3(p, q)).sum(), kl)


# ---- TRL


def padded(values):
    """Values (n) of rollouts laid end to end, a row a rollout."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(LENGTHS)), batch_first=True)


def trl_loss(loss, new, old, ref, advantages, ratio, **settings):
    """What `GRPOTrainer._compute_loss` makes of them: the method itself, of a trainer that is only state."""
    mask = padded(torch.ones(len(new)))
    state = SimpleNamespace(
        loss_type="grpo" if loss == "gspo" else loss,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        beta=settings["kl_coef"],
        epsilon_low=settings["clip_low"],
        epsilon_high=1 + settings["clip_high"] if loss == "cispo" else settings["clip_high"],
        args=SimpleNamespace(
            delta=settings.get("dual_clip"),
            use_bias_correction_kl=settings.get("kl_estimator") == "unbiased",
            steps_per_generation=1,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        model=SimpleNamespace(training=True),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        max_completion_length=SEQUENCE_TO_MEAN,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    state._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        padded(new),
        torch.zeros_like(mask),
        None,
    )
    ids = mask.long()
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": padded(old), "ref_per_token_logps": padded(ref),
        "importance_sampling_ratio": ratio, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(state, None, inputs)


def trl_ratio(mode, low, high, gaps):
    """TRL's importance weights of a mode: the lines of its own method that make them, run by themselves."""
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).splitlines()
    begin = next(i for i, line in enumerate(lines) if "sequence_level_is =" in line)
    end = next(i for i, line in enumerate(lines) if "Unknown vLLM importance sampling level" in line) + 2
    state = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    names = {"self": state, "torch": torch, "math": math, "per_token_logps_diff": padded(gaps)}
    exec(textwrap.dedent("\n".join(lines[begin:end])), names)
    return names["vllm_importance_sampling_ratio"]


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
WITH_TRL = [(loss, extra) for loss, bounds, extra in CASES if bounds == "default"]
WITH_TRL.remove(("gspo", "unbiased"))  # TRL weights a token's KL with the ratio of its rollout: biased


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("loss", "extra"), WITH_TRL)
def test_loss_and_gradient_are_trls_on_the_same_tensors(loss, mode, extra):
    logprobs, advantages = made(torch.float32)
    level, treatment = mode.split("_")
    bounds = CorrectionSettings(level=level, treatment=treatment, low=0.8, high=1.3)
    low = 1.0 if loss == "cispo" else 0.3  # TRL's has no lower bound
    settings = SETTINGS | {"clip_low": low} | EXTRAS[extra]
    new, theirs = (logprobs[0].clone().requires_grad_() for _ in range(2))
    got, _, _ = value(loss, new, logprobs, advantages, bounds, settings)
    ratio = trl_ratio(mode, 0.8, 1.3, logprobs[1] - logprobs[2])
    want = trl_loss(loss, theirs, logprobs[1], logprobs[3], advantages, ratio, **settings)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)
    (mine,), (his,) = torch.autograd.grad(got, new), torch.autograd.grad(want, theirs)
    torch.testing.assert_close(mine, his, rtol=2e-6, atol=1e-7)
