"""Recorded steps: complete, repeated bit for bit, compared with other objectives, refused where damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch

from pipeline.__main__ import main
from pipeline.errors import Stopped, UserError
from pipeline.run.checkpoint import write_manifest
from pipeline.run.directory import open_run
from pipeline.settings.common import OptimSettings
from pipeline.settings.rollouts import GrpoSettings
from pipeline.stages.grpo import Trainer
from pipeline.table import STAGES
from pipeline.tools import record, replay
from pipeline.train.policy import load_policy
from rollout.collect import Round
from rollout.settings import RolloutSettings
from tests.small import random_policy

STAGE = next(stage for stage in STAGES if stage.name == "zero")
STEPS, LONGEST, GROUP = 10, 12, 4


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


@pytest.fixture(scope="module")
def opened(policy):
    """`opened(runs, **settings)`: a trainer on sums, and the context of its run directory."""

    def make(runs, **settings):
        config = GrpoSettings(
            **{
                "runs": runs, "init_from": str(policy), "template": "r1-zero-short", "steps": STEPS,
                "problems": ("generator:sum",), "eval_every": 0, "prompts_per_step": 4, "group_size": GROUP,
                "max_tokens": LONGEST, "kl_coef": 0.0, "threads": 1, "minibatches": 2, "pool": 6,
                "rewards": {"accuracy": 1.0, "language": 1.0}, "optim": OptimSettings(lr=1e-2), **settings,
            }
        )  # fmt: skip
        run = open_run(STAGE, config, "make zero")
        return run, Trainer(config, run.__enter__())

    return make


@pytest.fixture(scope="module")
def recorded(opened, tmp_path_factory):
    """The directory of a stage that recorded ten steps of two updates, with a reference that is refreshed;
    the metrics of each step; the policy's weights at the end."""
    runs = tmp_path_factory.mktemp("runs")
    run, it = opened(runs, kl_coef=0.02, ref_refresh_steps=4, record_every=1)
    metrics = [it.step(step)[0] for step in range(1, STEPS + 1)]
    it.close()
    run.__exit__(None, None, None)
    return runs / "tiny/zero", metrics, {name: x.clone() for name, x in it.policy.state_dict().items()}


@pytest.fixture
def copy(recorded, tmp_path):
    """A copy of that directory with two of the steps."""
    path = tmp_path / "zero"
    shutil.copytree(recorded[0], path, ignore=shutil.ignore_patterns("recorded-[1-8]", "recorded-10"))
    return path


@pytest.fixture
def again(capsys):
    """The JSON of a replay, and the text before it."""

    def run(*args):
        assert main(["replay", *map(str, args)]) == 0
        *text, last = capsys.readouterr().out.strip().splitlines()
        return json.loads(last), "\n".join(text)

    return run


@pytest.fixture
def refusal(capsys):
    """The one line with which a replay is refused."""

    def run(*args):
        assert main(["replay", *map(str, args)]) == 2
        out = capsys.readouterr()
        assert not out.out and out.err.count("\n") == 1
        return out.err

    return run


# ---- the same bits


def test_ten_recorded_steps_repeat_bit_for_bit(recorded, again):
    folder, metrics, end = recorded
    for step, then in enumerate(metrics, start=1):
        result, text = again(folder, "--step", step)
        assert result["same_bits"] and result["step"] == step and "the same bits" in text
        assert result["grad_norm"] == then["optim/grad_norm"] and result["loss"] == then["loss/total"]
        assert result["cosine"] == pytest.approx(1) and result["recorded"]["loss"] == result["loss"]
        assert not set(result["differs"]) - {"commit", "modified"}
    manifests = [
        json.loads((folder / f"recorded-{n}/manifest.json").read_text()) for n in range(1, STEPS + 1)
    ]
    ends = [manifest["after"] for manifest in manifests]
    assert [manifest["before"] for manifest in manifests[1:]] == ends[:-1] and len(
        set(map(str, ends))
    ) == STEPS
    last, _ = load_policy(folder / f"recorded-{STEPS}/policy", torch.device("cpu"))
    assert not torch.equal(last.state_dict()["norm.weight"], end["norm.weight"])  # it is from before the step
    assert again(folder)[0]["step"] == STEPS  # without --step the last


def test_a_record_needs_nothing_else(copy, again, tmp_path):
    moved = shutil.move(copy, tmp_path / "elsewhere" / "grpo")
    assert again(moved, "--step", 9)[0]["same_bits"]


def test_what_differs_is_named(copy, again):
    manifest = copy / "recorded-9/manifest.json"
    table = json.loads(manifest.read_text())
    name = "layers.1.self_attn.o_proj.weight"
    table["after"][name] += 1
    table["environment"] |= {"packages.torch": "1.0", "commit": "abc"}
    manifest.write_text(json.dumps(table))
    result, text = again(copy, "--step", 9)
    assert not result["same_bits"] and name in text and "in 1 tensor" in text
    assert result["differs"]["packages.torch"] == ["1.0", torch.__version__] and "abc" in text


def test_a_step_that_stops_the_run_is_recorded(opened, again, tmp_path):
    run, it = opened(tmp_path, record=(1,), max_mismatch_kl=1e-25)
    with pytest.raises(Stopped, match="max_mismatch_kl"):
        it.step(1)
    it.close()
    run.__exit__(None, None, None)
    assert again(tmp_path / "tiny/zero")[0]["same_bits"]


def test_without_record_nothing_is_kept(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(Round, "plain", lambda self: pytest.fail("the round was copied"))
    run, it = opened(tmp_path, record=(2,))
    it.step(1)
    it.close()
    assert not list(tmp_path.rglob("*recorded*"))
    run.__exit__(None, None, None)


@pytest.mark.parametrize("at", ["write_atomic", "write_manifest"])
def test_killed_while_recording(opened, again, refusal, tmp_path, at, monkeypatch):
    run, it = opened(tmp_path, record=(1,))
    folder = tmp_path / "tiny/zero"
    if not (child := os.fork()):
        monkeypatch.setattr(record, at, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        it.step(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (folder / "recorded-1.partial/state.pt").is_file()
    assert "no recorded step" in refusal(folder, "--step", 1)
    it.step(1)
    it.close()
    run.__exit__(None, None, None)
    assert again(folder)[0]["same_bits"] and not (folder / "recorded-1.partial").exists()


# ---- another objective


def gradient(folder, loss):
    """Loss and gradient of one update at the recorded weights, off the page: one rollout at a time, every
    advantage from the rewards in transcripts of the record."""
    state = torch.load(folder / "state.pt", weights_only=True)
    net, _ = load_policy(folder / "policy", torch.device("cpu"))
    graded = state["round"]["graded"]
    half = graded[: len(graded) // 2]  # the first minibatch
    total = torch.zeros(())
    for at, g in enumerate(half):
        rewards = torch.tensor([x["reward"] for x in half[at // GROUP * GROUP :][:GROUP]], dtype=torch.double)
        prompt, ids = list(g["rollout"]["prompt"]["token_ids"]), g["rollout"]["token_ids"].tolist()
        advantage, share = g["reward"] - float(rewards.mean()), 1 / (len(half) * LONGEST)
        if loss == "grpo":
            deviation = float(rewards.std(unbiased=False))
            advantage, share = advantage / max(deviation, 1e-9), 1 / (len(half) * len(ids))
        logits = net.logits(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)[range(len(ids)), ids]
        engine = (logprobs.detach() - g["rollout"]["logprobs"]).exp().clamp(max=2.0)
        total = total - share * (advantage * engine * (logprobs - logprobs.detach()).exp()).sum()
    total.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return float(total.detach()), torch.cat([grad.flatten() for grad in grads]).double()


def test_both_gradients_are_those_of_a_loop(opened, again, tmp_path, monkeypatch):
    run, it = opened(tmp_path, record=(1,))
    it.step(1)
    it.close()
    run.__exit__(None, None, None)
    seen = []
    monkeypatch.setattr(replay, "show", lambda updates, *_: seen.append(updates))
    folder = tmp_path / "tiny/zero"
    result, _ = again(folder, "--step", 1, "--loss", "dr_grpo", "--advantage-scale", "none")
    assert result["same_bits"]  # the trial left the update as it is
    hand = [gradient(folder / "recorded-1", loss) for loss in ("grpo", "dr_grpo")]
    for found, (loss, grad) in zip(seen[0][0], hand, strict=True):
        assert found.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert found.norm == pytest.approx(float(grad.norm()), rel=1e-4)
    cosine = float(hand[0][1] @ hand[1][1] / hand[0][1].norm() / hand[1][1].norm())
    assert seen[0][0][1].cosine(seen[0][0][0]) == pytest.approx(cosine, rel=1e-4) and cosine < 0.9999
    assert result["cosine"] == seen[0][1][1].cosine(seen[0][1][0])  # of the last update
    for of, scale in zip(seen[0][0], (1, 1 / LONGEST), strict=True):  # contribution: -weight advantage ratio
        for contribution, advantage, ratio in of.tokens.values():
            assert contribution * advantage <= 0 and ratio > 0
            if scale != 1:
                assert contribution == pytest.approx(-advantage * scale / (2 * GROUP), rel=1e-5)


def rows_of(text):
    """The first table's rows by update and objective."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {(int(row[0]), row[1]): [float(x) for x in row[2:]] for row in rows if len(row) == 6}


def test_clipping_shows_in_the_second_update_alone(recorded, again):
    clip = ("--clip-low", "1e-6", "--clip-high=1e-6")
    result, text = again(recorded[0], "--step", 3, *clip)
    rows, loss, norm, cosine = rows_of(text), 0, 1, 3
    assert rows[1, " ".join(clip)][cosine] == pytest.approx(1, abs=1e-5) and result["cosine"] < 0.999
    assert result["same_bits"] and result["grad_norm"] != result["recorded"]["grad_norm"]
    assert rows[2, "recorded"][norm] == pytest.approx(result["recorded"]["grad_norm"], rel=1e-5)
    assert rows[2, " ".join(clip)][loss] == pytest.approx(result["loss"], rel=1e-5)
    assert text.count("│") == 7 * 4 + 8 * replay.SHOWN and "contributions that differ most" in text
    _, text = again(recorded[0], "--step", 3, *clip, "--kl-coef", "0")  # whose share no clip takes away
    count = {at: row[2] for (at, title), row in rows_of(text).items() if title != "recorded"}
    assert 0 < count[2] < count[1]


def test_an_override_without_effect_says_that_nothing_differs(recorded, again):
    result, text = again(recorded[0], "--step", 1, "--clip-high", "0.2")  # as recorded
    assert result["cosine"] == pytest.approx(1) and "contributions" not in text
    assert result["loss"] == result["recorded"]["loss"]


def test_no_penalty_takes_no_reference(recorded, again):
    result, _ = again(recorded[0], "--step", 3, "--kl-coef", "0")
    assert result["loss"] != result["recorded"]["loss"] and result["cosine"] > 0.5


def test_overrides_come_from_the_settings_of_the_stage():
    assert replay.overrides(["--loss", "gspo", "--kl_coef=0", "--temperature", "2"]) == [
        *("--loss", "gspo", "--kl-coef=0", "--temperature", "2")
    ]
    for flag in ("--seed", "--group-size", "--optim.lr", "--steps", "--rewards.accuracy", "--record", "--lr"):
        with pytest.raises(UserError, match=f"{flag} is no setting of an objective.*--loss"):
            replay.overrides([flag, "1"])


def test_a_setting_of_a_group_is_known_by_its_last_name(monkeypatch):
    flags = [
        "--loss",
        "--correction.level",
        "--correction.no-strict",
        "--overlong-filter",
        "--no-overlong-filter",
    ]
    monkeypatch.setattr(replay, "known_flags", lambda settings: iter(flags))
    given = ["--level", "token", "--no-strict", "--correction.level=sequence", "--no-overlong-filter"]
    want = ["--correction.level", "token", "--correction.no-strict", *given[3:]]
    assert replay.overrides(given) == want


# ---- what is refused


def flipped(file, at=-5):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["state.pt", "policy/model.safetensors", "config.toml"])
def test_a_changed_byte_is_named(copy, refusal, name):
    flipped(copy / "recorded-9" / name)
    file = f"recorded-9/{name.partition('/')[0]}"
    assert f"{file} does not match its manifest (corrupted); rm -r" in refusal(copy, "--step", 9)


def test_other_weights_are_named(copy, refusal):
    folder = copy / "recorded-9"
    table = json.loads((folder / "manifest.json").read_text())
    flipped(folder / "policy/model.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder, **{key: value for key, value in table.items() if key != "files"})
    error = refusal(copy, "--step", 9)
    assert "has other weights than its step began with, in " in error and ".weight" in error


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step": 9, "files": {}}', None])
def test_a_torn_record_is_named(copy, refusal, text):
    manifest = copy / "recorded-9/manifest.json"
    manifest.unlink()
    if text:
        manifest.write_text(text)
    assert "recorded-9" in refusal(copy, "--step", 9)


def test_what_is_not_there_is_named(recorded, refusal, tmp_path):
    folder = recorded[0]
    assert "has no recorded step 11; there are: 1, 2, 3" in refusal(folder, "--step", 11)
    assert "is no run of an RL stage, such as runs/NAME/zero (zero, grpo," in refusal(folder.parent)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/config.toml").touch()
    assert "is no run of an RL stage" in refusal(tmp_path / "sft")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/config.toml").touch()
    assert "has no recorded steps; train with --record N" in refusal(tmp_path / "zero")
    assert "--folder" in refusal()
    assert "typo" in refusal(folder, "--loss", "typo")
    assert "clip_low" in refusal(folder, "--clip-low", "7")
    assert "--seed is no setting of an objective" in refusal(folder, "--seed", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(recorded, refusal):
    assert "--device cuda: torch finds no GPU here" in refusal(recorded[0], "--device", "cuda")


def test_routes_and_drafts_of_the_recorded_step_are_repeated(opened, again, tmp_path):
    engine = RolloutSettings(dtype="bfloat16")  # so that its experts differ from the trainer's
    run, it = opened(tmp_path, record=(2,), router_replay=True, mtp_coef=0.5, rollout=engine)
    metrics = [it.step(step)[0] for step in (1, 2)]
    it.close()
    run.__exit__(None, None, None)
    result, _ = again(tmp_path / "tiny/zero")
    assert metrics[1]["loss/mtp"] > 0 and metrics[1]["policy/experts_differ"] > 0
    assert result["same_bits"] and result["loss"] == metrics[1]["loss/total"]


def test_a_step_of_rollouts_from_a_queue_is_repeated(opened, again, tmp_path):
    run, it = opened(tmp_path, record=(3,), staleness=4, max_mismatch_kl=9.0)
    metrics = [it.step(step)[0] for step in (1, 2, 3)]
    it.close()
    run.__exit__(None, None, None)
    assert metrics[2]["rollout/staleness"] == 4 and metrics[2]["policy/mismatch_kl"] > 1e-4
    result, _ = again(tmp_path / "tiny/zero")
    assert result["same_bits"] and result["loss"] == metrics[2]["loss/total"]


def test_a_penalty_without_a_reference_is_refused(opened, refusal, tmp_path, capsys):
    run, it = opened(tmp_path, record=(1,))
    it.step(1)
    it.close()
    run.__exit__(None, None, None)
    capsys.readouterr()
    assert "recorded without a reference" in refusal(tmp_path / "tiny/zero", "--kl-coef", "0.1")


def test_steps_that_cannot_be_recorded_are_refused():
    with pytest.raises(ValueError, match="record=11 must be one of the steps, 1 to 10"):
        GrpoSettings(steps=10, record=(2, 11))
