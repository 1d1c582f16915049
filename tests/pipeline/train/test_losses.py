"""The policy loss and the log-probabilities against loops, floats and float64."""

import math

import pytest
import torch

from pipeline.errors import UserError
from pipeline.settings.rollouts import LOSS_NAMES, GrpoSettings
from pipeline.train.losses import (
    LOSSES,
    SETTINGS,
    Tokens,
    grpo,
    k3,
    loss_named,
    settings_of,
    takes_settings,
    weighted_per,
)
from pipeline.train.pack import rollout_weights
from pipeline.train.rollouts import batch_advantages, group_advantages


def tokens_of(new, old, ref, advantages, weights, lengths=None):
    """What a loss sees; the engine's log-probabilities are the trainer's."""
    rollout = torch.arange(len(lengths or [1])).repeat_interleave(torch.tensor(lengths or [len(new)]))
    return Tokens(new, old, old, ref, advantages, weights, rollout, len(lengths or [1]))


def clipped_objective(rollouts, low, high, beta):
    """GRPO Eq. 3 and 4 read off the page: mean over rollouts of the mean over tokens."""
    total = 0.0
    for advantage, tokens in rollouts:
        value = 0.0
        for new, old, ref in tokens:
            rho = math.exp(new - old)
            clipped = min(max(rho, 1 - low), 1 + high)
            kl = math.exp(ref - new) - (ref - new) - 1
            value += min(rho * advantage, clipped * advantage) - beta * kl
        total += value / len(tokens)
    return total / len(rollouts)


@pytest.mark.parametrize("lengths", [[1], [3, 3], [1, 7, 2, 40]])
@pytest.mark.parametrize("high", [0.2, 10.0])
def test_policy_loss_is_the_papers_objective_negated(lengths, high):
    torch.manual_seed(0)
    advantages = torch.randn(len(lengths), dtype=torch.double)
    new, old, ref = -3 * torch.rand(3, sum(lengths), dtype=torch.double)  # ratios reach e^3: both clips bite
    lens = torch.tensor(lengths)
    weights = torch.tensor(rollout_weights(lengths, grpo.per, 64), dtype=torch.double).repeat_interleave(lens)
    tokens = tokens_of(new, old, ref, advantages.repeat_interleave(lens), weights, lengths)
    got, metrics = grpo(tokens, clip_low=0.2, clip_high=high, kl_coef=0.04)
    rows = torch.stack([new, old, ref], 1).split(lengths)
    rollouts = list(zip(advantages.tolist(), [r.tolist() for r in rows], strict=True))
    assert got.item() == pytest.approx(-clipped_objective(rollouts, 0.2, high, 0.04), rel=1e-12)
    assert 0 <= metrics["loss/clip_frac"] <= 1


def test_the_gradient_is_that_of_the_objective():
    torch.manual_seed(1)
    new = (-torch.rand(12, dtype=torch.double)).requires_grad_()
    old, ref, advantages = (
        -torch.rand(12, dtype=torch.double),
        -torch.rand(12, dtype=torch.double),
        torch.randn(12).double(),
    )
    weights = torch.full((12,), 1 / 12, dtype=torch.double)

    def loss(x):
        tokens = tokens_of(x, old, ref, advantages, weights)
        return grpo(tokens, clip_low=0.2, clip_high=0.2, kl_coef=0.01)[0]

    assert torch.autograd.gradcheck(loss, new)


@pytest.mark.parametrize("kind", LOSSES)
def test_rollout_weights_are_each_papers_mean(kind):
    lengths, values = [2, 5, 1], [[1.0, 2.0], [3.0] * 5, [7.0]]
    weights = rollout_weights(lengths, LOSSES[kind].per, max_tokens=10)
    got = sum(w * sum(v) for w, v in zip(weights, values, strict=True))
    want = {"rollout": (1.5 + 3 + 7) / 3, "token": (3 + 15 + 7) / 8, "constant": (3 + 15 + 7) / 30}
    per = {"grpo": "rollout", "gspo": "rollout", "dapo": "token", "cispo": "token", "dr_grpo": "constant"}
    assert got == pytest.approx(want[per[kind]])


def test_the_settings_know_the_losses_by_name():
    assert tuple(LOSSES) == LOSS_NAMES


def test_the_losses_differ_in_their_weights_alone():
    """DAPO's and Dr. GRPO's surrogate is GRPO's, dual clip included; each states its own mean."""
    torch.manual_seed(2)
    tokens = tokens_of(*-torch.rand(3, 9).double(), torch.randn(9).double(), torch.rand(9).double())
    settings = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.3, "kl_coef": 0.01}
    losses = [LOSSES[name] for name in ("grpo", "dapo", "dr_grpo")]
    values = {float(loss(tokens, **settings)[0]) for loss in losses}
    assert len(values) == 1 and len({loss.per for loss in losses}) == 3


OWN = """
from pipeline.train.losses import weighted_per

@weighted_per("token")
def reinforce(tokens):
    return -(tokens.weights * tokens.advantages * tokens.logprobs).sum(), {}

def half(tokens, *, clip_low, temperature_of_mars):
    return tokens.logprobs.sum(), {}

def nothing():
    return 0

def raises(tokens):
    return tokens.logprobs / 0 + [], {}

def alone(tokens):
    return tokens.logprobs.sum()

def each(tokens):
    return tokens.logprobs, {}

def floats(tokens):
    return tokens.logprobs.sum(), {"loss/mine": 1.0}

def constant(tokens):
    return tokens.weights.sum(), {}

def ours(tokens):
    return tokens.logprobs.sum(), {"policy/mismatch_kl": tokens.weights.sum()}

def shared(tokens):
    return tokens.logprobs.sum(), {"loss/kl_ref": tokens.weights.sum()}

def bounded(tokens, *, dual_clip, kl_estimator):
    assert kl_estimator in ("k3", "unbiased")
    return -(tokens.mean(tokens.logprobs) * tokens.advantages).clamp(max=dual_clip).sum(), {}

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of losses in the working directory, outside the package."""
    (tmp_path / "my_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", r"failed at .*my_losses.py:\d+: TypeError"),
        ("alone", "failed at .*"),
        ("each", "failed at .*: it must return .scalar tensor"),
        ("floats", "failed at .*'float' object has no attribute"),
        ("constant", "failed at .*: it must return .scalar tensor from tokens.logprobs"),
        ("ours", "failed at .*: its metric policy/mismatch_kl is one of ours; rename it"),
    ],
)
def test_a_loss_of_your_own_that_is_wrong_is_one_line(own, name, says):
    logprobs = torch.zeros(3, requires_grad=True)
    tokens = tokens_of(logprobs, *torch.zeros(2, 3), torch.ones(3), torch.ones(3))
    with pytest.raises(UserError, match=f"^loss 'my_losses:{name}' {says}") as error:
        loss_named(f"my_losses:{name}")(tokens)
    assert "\n" not in str(error.value)
    assert loss_named("my_losses:shared")(tokens)[1]


def test_a_loss_of_your_own_is_found_and_says_what_it_takes(own):
    loss = loss_named("my_losses:reinforce")
    assert takes_settings(loss, "reinforce") == set() and loss.per == "token"
    assert takes_settings(grpo, "grpo") == set(SETTINGS)
    assert takes_settings(loss_named("my_losses:bounded"), "bounded") == {"dual_clip", "kl_estimator"}
    assert weighted_per("constant")(lambda tokens: None).per == "constant"


def test_a_loss_of_your_own_takes_the_settings_that_it_names_and_no_others_are_set_in_vain(own):
    config = GrpoSettings(loss="my_losses:bounded", dual_clip=3.0, kl_estimator="unbiased")
    assert settings_of(loss_named(config.loss), config) == {"dual_clip": 3.0, "kl_estimator": "unbiased"}
    for setting in ({"dual_clip": 3.0}, {"kl_estimator": "unbiased"}):
        config = GrpoSettings(loss="my_losses:reinforce", **setting)
        with pytest.raises(ValueError, match=f"'my_losses:reinforce' does not take {next(iter(setting))}"):
            settings_of(loss_named(config.loss), config)


@pytest.mark.parametrize("name", LOSSES)
def test_dual_clip_is_refused_where_a_loss_does_not_take_it(name):
    if "dual_clip" in takes_settings(LOSSES[name], name):
        assert GrpoSettings(loss=name, dual_clip=3.0).dual_clip == 3.0
    else:
        with pytest.raises(ValueError, match=f"dual_clip=3 has no effect on the loss {name}"):
            GrpoSettings(loss=name, dual_clip=3.0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpro", r"did you mean .*\bgrpo\b.*\?"),
        ("my_losses:reinforced", "reinforce"),
        ("my_losses:NUMBER", "NUMBER"),
        ("no_such_file:f", "no_such_file"),
        ("my_losses:half", "temperature_of_mars"),
        ("my_losses:nothing", "is not f.tokens"),
        ("os:getcwd", "is not f.tokens"),
    ],
)
def test_a_loss_that_is_none_is_refused_in_one_line(own, name, says):
    with pytest.raises(ValueError, match=says) as error:
        loss_named(name)
    assert "\n" not in str(error.value)


def test_k3_is_unbiased():
    """Its mean over the policy is the KL divergence itself, summed exactly over a small vocabulary."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 9, dtype=torch.double).log_softmax(-1)
    assert (p.exp() * k3(p, q)).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-12)


def test_advantages_by_hand():
    assert group_advantages([1.0, 0.0, 0.0, 1.0], "std") == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "none") == [0.75, -0.25, -0.25, -0.25]


def test_a_failed_verifier_has_no_say():
    assert group_advantages([1.0, None, 0.0], "none") == [0.5, None, -0.5]
    assert group_advantages([None, None], "std") == [None, None]
    assert group_advantages([0.3, 0.3, None], "std") == [0.0, 0.0, None]


def test_the_deviation_of_the_batch_is_over_the_advantages_of_all_groups():
    """REINFORCE++'s baseline by hand: group means off, then one deviation, not that of the rewards."""
    groups = [[1.0, 0.0, None], [5.0, 5.0, 5.0], [4.0, 0.0, 2.0]]
    advantages = [0.5, -0.5, None, 0.0, 0.0, 0.0, 2.0, -2.0, 0.0]
    assert batch_advantages(groups, "none") == advantages
    spread = math.sqrt((0.25 + 0.25 + 4 + 4) / 8)
    want = [None if a is None else pytest.approx(a / spread) for a in advantages]
    assert batch_advantages(groups, "batch") == want
    assert batch_advantages(groups, "std")[:3] == [1.0, -1.0, None]
    assert batch_advantages([[1.0, 1.0], [None, 2.0]], "batch") == [0.0, 0.0, None, 0.0]
