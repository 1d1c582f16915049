"""Divergence is skipped, said, rolled back and stopped by name; a kill in between changes no bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_learner import learner, sequences, supervised

from pipeline.errors import Stopped
from pipeline.run import directory
from pipeline.run.directory import open_run
from pipeline.run.guard import LEAST, Diverged, Guard
from pipeline.settings.common import GuardSettings, OptimSettings
from pipeline.settings.supervised import PretrainSettings
from pipeline.stages import pretrain
from pipeline.table import STAGES
from pipeline.train.learner import Learner
from pipeline.train.rollouts import Watch
from pipeline.train.supervised import save_state
from rollout.types import Graded, Problem, Prompt, Rollout

STAGE = next(stage for stage in STAGES if stage.name == "pretrain")
LR = 1e-3


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch):
    """`run(name, **settings)`: pretraining of ten updates, a checkpoint after each third; its directory."""

    monkeypatch.setattr(pretrain, "train_tokenizer", lambda texts, size: tokenizer)

    def go(name="a", **settings):
        config = PretrainSettings(
            **{
                "runs": tmp_path, "name": name, "task": "sum", "pool": 50, "steps": 10, "batch_tokens": 128,
                "max_length": 64, "vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2,
                "mtp_coef": 0.0, "num_attention_heads": 2, "moe_intermediate_size": 16, "log_every": 1,
                "checkpoint_every": 3, "threads": 1,
                "resume": (tmp_path / name / "pretrain/config.toml").exists(),
                "optim": OptimSettings(lr=LR), **settings,
            }
        )  # fmt: skip
        with open_run(STAGE, config, "make pretrain") as run_dir:
            pretrain.run(config, run_dir)
        return run_dir.path

    return go


@pytest.fixture
def inject(monkeypatch):
    """`inject(f)`: the loss weights of an update are times f(update from 1, learning rate)."""
    real = Learner.supervised_update

    def install(factor):
        def update(self, batch):
            for micro in batch.parts[0]:
                micro.weights[:] = micro.weights * factor(self.updates + 1, self.optim.lr)
            return real(self, batch)

        monkeypatch.setattr(Learner, "supervised_update", update)

    return install


def bits(path):
    return load_file(path / "model/model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(path):
    return json.loads((path / "env.json").read_text()).get("history", [])


def rows(path):
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def unstable(update, lr):
    """Not finite from the ninth update on, unless the rate is lower."""
    return float("nan") if update >= 9 and lr > 0.6 * LR else 1.0


GUARD = GuardSettings(max_skipped=2)

# ---- one update


@pytest.mark.parametrize(("factor", "why"), [(float("nan"), "not finite"), (1e4, "is a spike")])
def test_one_bad_update_is_skipped_and_said_and_nothing_moves(run, inject, capsys, factor, why):
    inject(lambda update, lr: factor if update == 7 else 1.0)
    path = run()
    assert f"update 7 skipped: its {'loss' if why == 'not finite' else 'gradient norm'}" in (
        said := capsys.readouterr().out
    )
    assert why in said and said.count("skipped") == 1
    found = rows(path)
    assert [row["optim/skipped"] for row in found] == [0] * 6 + [1] * 4
    assert ("optim/grad_norm" in found[6]) == (factor == 1e4), "no number in the place of one that is none"
    assert all(tensor.isfinite().all() for tensor in bits(path).values()) and not history(path)


def test_a_skipped_update_moves_neither_weights_nor_the_bias_of_the_router():
    it = learner(gamma=0.01)
    it.supervised_update(supervised(40, sequences()))
    before = {name: tensor.clone() for name, tensor in it.policy.state_dict().items()}
    bad = supervised(40, sequences(seed=1))
    bad.parts[0][0].weights[2] = float("nan")
    metrics = it.supervised_update(bad)
    assert metrics["optim/skipped"] == 1 and "loss/lm" not in metrics
    assert all(torch.equal(tensor, before[name]) for name, tensor in it.policy.state_dict().items())
    it.supervised_update(supervised(40, sequences(seed=1)))
    after = it.policy.state_dict()
    assert any("correction_bias" in name and not torch.equal(after[name], before[name]) for name in after)


def test_a_spike_is_beyond_the_clip_and_all_that_was_before():
    norms = [0.1] * LEAST
    cases = {(1, 10, 0.9): True, (1, 10, 1.1): False, (0, 10, 0.9): True, (0, 10, 1.1): False}
    for (clip, factor, norm), accepted in {**cases, (1, 0, 99.0): True, (2, 10, 1.1): True}.items():
        guard = Guard(GuardSettings(max_spike=factor), clip)
        assert all(guard.accepts(n, finite=True) for n in norms)
        assert guard.accepts(norm, finite=True) is accepted
    first = Guard(GuardSettings(), 1.0)
    assert first.accepts(1e-6, finite=True) and first.accepts(50.0, finite=True)  # nothing to compare with


def test_too_many_skipped_updates_need_not_be_in_a_row():
    guard = Guard(GuardSettings(max_skipped=3), 1.0)
    for _ in range(2):
        assert not guard.accepts(1.0, finite=False) and guard.accepts(1.0, finite=True)
    with pytest.raises(Diverged, match="3 of the last 5 updates were skipped"):
        guard.accepts(float("inf"), finite=True)


def test_skips_before_a_rollback_or_a_change_by_hand_count_no_more():
    before, again, later = (Guard(GuardSettings(max_skipped=3), 1.0, era=era) for era in (1, 1, 2))
    for norm in (1.0, float("inf"), float("inf")):
        before.accepts(norm)
    again.load_state_dict(before.state_dict())
    with pytest.raises(Diverged, match="3 of the last 4"):
        again.accepts(float("nan"))
    later.load_state_dict(before.state_dict())
    assert later.recent == [1.0] and not later.accepts(float("nan"))


# ---- a run


def test_divergence_goes_back_to_a_checkpoint_with_a_lower_rate(run, inject, capsys):
    inject(unstable)
    path = run(guard=GUARD)
    assert "2 of the last 10 updates were skipped" in (said := capsys.readouterr().out)
    assert "back to step 6, learning rate times 0.5" in said
    assert [(e["update"], e["to"], e["lr_scale"]) for e in history(path)] == [(10, 6, 0.5)]
    assert [row["optim/lr"] for row in rows(path)] == [LR] * 6 + [LR / 2] * 4
    assert [row["step"] for row in rows(path)] == list(range(1, 11))


@pytest.mark.parametrize("at", [1, 4, 8, 9, 10, "go_back", "note", "truncate_after"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(run, inject, at):
    """After a step, 10 is after the rollback; or within the rollback."""
    inject(unstable)
    through = run("through", guard=GUARD)
    name = "log" if isinstance(at, int) else at
    where = directory.RunDir if name == "log" else directory
    real = getattr(where, name)

    def killed(*args):
        if name != "log":
            raise Killed
        real(*args)
        if args[1] == at:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, killed)
        run("cut", guard=GUARD)
    cut = run("cut", guard=GUARD)
    assert same(bits(cut), bits(through)) and rows(cut) == rows(through) and history(cut) == history(through)


@pytest.mark.parametrize("at", [7, 9])
def test_a_ctrl_c_changes_no_bits_either(run, inject, at):
    """Before bad updates, where the rollback could go to its checkpoint, or among them."""
    inject(unstable)
    through = run("through", guard=GUARD)

    def log(self, step, total, metrics, real=directory.RunDir.log):
        real(self, step, total, metrics)
        self.interrupted = self.interrupted or step == at

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(directory.RunDir, "log", log)
        run("cut", guard=GUARD)
    cut = run("cut", guard=GUARD)
    assert same(bits(cut), bits(through)) and history(cut) == history(through)


def test_a_run_that_diverges_again_and_again_is_stopped_and_a_lower_rate_goes_on(run, inject, capsys):
    def worse(update, lr):
        return float("nan") if update >= 9 and lr > 0.1 * LR else 1.0

    inject(worse)
    with pytest.raises(Stopped, match=r"after 2 rollbacks\. .*checkpoint-\d is kept; lower the rate") as stop:
        run(guard=GUARD)
    assert "make pretrain --resume --optim.lr VALUE" in str(stop.value) and "\n" not in str(stop.value)
    with pytest.raises(Stopped, match="after 2 rollbacks"):
        run(guard=GUARD)  # the same again
    path = run(guard=GUARD, optim=OptimSettings(lr=LR / 20))
    assert rows(path)[-1]["optim/lr"] == LR / 20, "a rate that was chosen is not lowered by earlier rollbacks"
    assert all(tensor.isfinite().all() for tensor in bits(path).values())


def test_a_run_without_one_good_update_is_stopped_at_once(run, inject):
    inject(lambda update, lr: float("nan"))
    with pytest.raises(Stopped, match="before any update was applied") as stop:
        run(guard=GUARD)
    assert "no checkpoint yet" in str(stop.value)
    with pytest.raises(Stopped, match="no update was applied, so the model is the one it began with"):
        run("short", steps=1)


# ---- rollouts


def graded(verdict="correct", reward=1.0, finish="stop"):
    rollout = Rollout(Prompt(Problem("p", "math", "?"), "raw", (1,)), 0, 0, (2,), (0.0,), finish)
    return Graded(rollout, "", {}, reward, verdict, "the solver is gone" if verdict == "error" else "")


class Kept:
    """Stands for a run directory."""

    command = "make zero"

    def kept(self):
        return "checkpoint-2 is kept"


def test_what_a_step_cannot_learn_from_is_said_and_stops_the_run(capsys):
    watch = Watch(Kept(), max_error_share=0.5, max_idle_steps=3)

    def look(*rollouts, spread=1.0):
        watch.look(1, rollouts, spread)
        watch.check()
        return capsys.readouterr().out

    assert look(graded(), graded("incorrect", 0.0)) == ""
    assert "the verifier failed on 50% of 2 rollouts; most often: the solver is gone" in look(
        graded(), graded("error")
    )
    assert "all 2 rollouts were cut at 1 tokens: raise --max-tokens" in look(
        graded(finish="length"), graded(finish="length")
    )
    look(graded(finish="length"))
    with pytest.raises(Stopped, match="every rollout was cut, for 3 steps in a row"):
        look(graded(finish="length"))
    look(graded())
    several = graded(finish="length")
    several = replace(several, rollout=replace(several.rollout, observed=((0, 1),)))
    for _ in range(4):  # cut by the number of turns: they teach as long as rewards differ
        assert "raise --max-tokens or --max-turns" in look(several)
    assert "no group of this step has spread in its rewards" in look(graded(), graded(), spread=0.0)
    look(graded(), spread=0.0)
    state = watch.state_dict()
    with pytest.raises(Stopped, match=r"no group had spread .* for 3 steps in a row .*checkpoint-2 is kept"):
        look(graded(), spread=0.0)
    watch.load_state_dict(state)
    with pytest.raises(Stopped, match="3 steps in a row"):
        look(graded(), spread=0.0)
    assert "failed on 100% of 2" in look(graded("error"), graded("error"))
    with pytest.raises(Stopped, match="failed on more than 50% of the rollouts of 2 steps in a row"):
        look(graded("error"), graded("error"), spread=0.0)


def test_a_disk_that_is_full_says_so_as_a_system_error(tmp_path):
    """torch.save to a path has a RuntimeError that names no cause."""

    class Full:
        def checkpoint(self, step, write, applied):
            (tmp_path / "state.pt").symlink_to("/dev/full")
            write(tmp_path)

    with pytest.raises(OSError, match="No space left"):
        save_state(Full(), 1, {"weights": torch.zeros(10_000)})
