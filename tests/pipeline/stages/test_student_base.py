"""The small dense base, and the rule that ends pretraining: which loss, where it fires, what follows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from model.dense import DensePolicy
from pipeline.__main__ import main
from pipeline.data.generators import items
from pipeline.data.traces import RESULT, worked
from pipeline.settings.common import OptimSettings
from pipeline.settings.supervised import StopSettings, StudentSettings
from pipeline.stages.pretrain import ASIDE, held_out
from pipeline.train.learner import Learner, learning_rate
from pipeline.train.supervised import HeldOut
from tests.small import llama

MICRO = Path(__file__).parents[3] / "configs/micro/student.toml"
STOP = StopSettings(loss=1.0, every=3, documents=6)
OPTIM = OptimSettings(lr=1.0, schedule="linear", min_lr_ratio=0.0, decay_steps=4)
CONFIG = StudentSettings(task="sum", stop=STOP, optim=OPTIM, seed=4)


def plain_loss(net, tokenizer):
    """Mean over the tokens of solutions, each after its problem alone, by transformers; and the problems."""
    total, scored, seen = 0.0, 0, []
    for item in [i for i in items(CONFIG.task, 24, "heldout", CONFIG.seed + ASIDE) if i.steps][:6]:
        asked = tokenizer.encode(f"Problem: {item.question}\nSolution:\n", add_special_tokens=False)
        text = f"{worked(item.steps, item.language)}\n{RESULT[item.language].format(item.answer)}"
        ids = [*asked, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        logs = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(logs[at - 1, ids[at]].item() for at in range(len(asked), len(ids)))
        scored += len(ids) - len(asked)
        seen.append(item.key)
    return total / scored, seen


@pytest.fixture
def learned(tokenizer):
    """A learner of random weights with 100 updates to make, and what transformers says of its loss."""
    made = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    learner = Learner(DensePolicy(llama(**made)).train(), OPTIM, 100)
    learner.updates = 30
    return learner, *plain_loss(llama(**made), tokenizer)


def test_the_loss_is_that_of_the_solutions_of_problems_that_are_never_trained_on(learned, tokenizer):
    learner, expected, keys = learned
    aside = HeldOut(held_out(CONFIG, tokenizer, 64), STOP)
    assert aside.check(learner, 3) == {"heldout/loss": pytest.approx(expected, rel=1e-5)}
    assert aside.check(learner, 4) == {}, "not due"
    trained = {item.key for item in items(CONFIG.task, 500, "train", CONFIG.seed)}
    assert len(keys) == 6 and not trained & set(keys)


@pytest.mark.parametrize(("factor", "end"), [(0.99, 100), (1.01, 34)])
def test_at_the_loss_the_rate_begins_to_fall_and_the_end_is_set(learned, tokenizer, factor, end):
    learner, expected, _ = learned
    rule = dataclasses.replace(STOP, loss=expected * factor)
    HeldOut(held_out(CONFIG, tokenizer, 64), rule).check(learner, 30)
    assert learner.total_updates == end
    rates = [learning_rate(OPTIM, update, end) for update in (0, 29, *range(end - 4, end))]
    assert rates == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0])


def test_the_rule_cannot_outlast_the_steps(learned):
    learner, *_ = learned
    learner.updates = 98
    learner.decay_now()
    assert learner.total_updates == 100


def test_an_end_without_having_learned_enough_is_said(learned, tokenizer, capsys):
    learner, expected, _ = learned
    for factor, early, said in ((0.99, None, 1), (1.01, None, 0), (0.99, 34, 0)):
        rule = dataclasses.replace(STOP, loss=expected * factor)
        learner.early = early
        HeldOut(held_out(CONFIG, tokenizer, 64), rule).warn(learner)
        assert capsys.readouterr().out.count("still above stop.loss=") == said


def test_a_stage_that_ends_so_says_it(tokenizer, tmp_path, capsys):
    base = tmp_path / "base"
    llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    line = ["student", "--config", str(MICRO), "--runs", str(tmp_path), "--tokenizer-from", str(base)]
    assert main([*line, "--threads", "1", "--steps", "6", "--stop.loss", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "still above stop.loss=0.001 after 6 updates" in out and "raise steps" in out
