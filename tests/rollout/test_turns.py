"""Rollouts of several turns: tokens are the engine's own, observations lie between, ends are named."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from model.dense import DensePolicy
from model.transformer import Transformer
from rollout.dense.engine import DenseEngine
from rollout.engine import RolloutEngine
from rollout.native.engine import NativeEngine
from rollout.text.tokenizer import completion_text, control_tokens, encode_text, make_prompt, next_turn
from rollout.turns.engine import Environment, TurnEngine
from rollout.types import Problem, Rollout, SamplingParams
from tests.small import llama, tiny

SAMPLED = SamplingParams(max_tokens=40, n=4, seed=3)
SAID = "obs <answer>1</answer>"


@pytest.fixture(scope="module", params=["native", "dense"])
def inner(request, tokenizer):
    eos = tokenizer.eos_token_id
    if request.param == "dense":
        net = llama(vocab_size=len(tokenizer), eos_token_id=eos, max_position_embeddings=128)
        return DenseEngine(DensePolicy(net), eos_token_id=eos, tokenizer=tokenizer)
    net = Transformer(tiny(len(tokenizer), eos_token_id=eos, initializer_range=0.1), seed=0).eval()
    return NativeEngine(net, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    asked = [Problem(str(i), "math", f"What is {i}+4?", answer=str(i + 4)) for i in range(4)]
    return [make_prompt(tokenizer, problem, "r1-zero-short") for problem in asked]


def talk(problem):
    """Answers two turns."""
    return lambda messages: SAID if len(messages) < 5 else None


def play(engine, tokenizer, prompts, start=talk, sampling=SAMPLED, stop=("e", "1", "u"), **limits):
    limits = {"max_turns": 4, **limits}
    turns = TurnEngine(
        engine, Environment(start, stop), tokenizer, frozenset([tokenizer.eos_token_id]), **limits
    )
    made = sorted(turns.generate(prompts, sampling), key=lambda r: (r.index, r.sample))
    assert [(r.index, r.sample) for r in made] == [(i, s) for i in range(len(prompts)) for s in range(4)]
    return made


class Recording(RolloutEngine):
    """Notes what the engine inside is asked and gives."""

    def __init__(self, engine):
        self.engine, self.requests = engine, []

    def generate(self, prompts, sampling):
        made = []
        self.requests.append((list(prompts), sampling, made))
        for rollout in self.engine.generate(prompts, sampling):
            made.append(rollout)
            yield rollout


def test_a_rollout_is_what_the_engine_sampled_with_the_observations_between(inner, tokenizer, prompts):
    engine = Recording(inner)
    rollouts = play(engine, tokenizer, prompts)
    several = [r for r in rollouts if len(r.observed) == 2]
    assert several and all(r.max_tokens == 0 and len(r.token_ids) <= 40 for r in rollouts)
    seeds = [sampling.seed for _, sampling, _ in engine.requests]
    assert len(set(seeds)) == len(seeds) > 1
    turns = {}  # by the tokens that stood before
    for _, _, made in engine.requests:
        for turn in made:
            turns.setdefault(tuple(turn.prompt.token_ids), []).append(turn)
    for r in rollouts:
        before, parts = list(r.prompt.token_ids), r.turns
        assert [own for own, _ in parts] == [i % 2 == 0 for i in range(len(parts))]
        at = 0
        for own, ids in parts:
            logprobs = list(r.logprobs[at : at + len(ids)])
            if own:  # the longest is cut at max_tokens
                of = [t for t in turns[tuple(before)] if list(t.token_ids[: len(ids)]) == list(ids)]
                assert any(list(t.logprobs[: len(ids)]) == logprobs for t in of)
            else:
                end = tokenizer.decode([before[-1]])
                eos = before[-1] == tokenizer.eos_token_id
                text = next_turn(tokenizer, SAID, "r1-zero-short", end) if eos else SAID
                assert list(ids) == encode_text(tokenizer, text) and not any(logprobs)
            before += ids
            at += len(ids)


def test_the_same_request_gives_the_same_rollouts(inner, tokenizer, prompts):
    one, two = (play(inner, tokenizer, prompts) for _ in range(2))
    assert [list(r.token_ids) for r in one] == [list(r.token_ids) for r in two]
    assert [list(r.logprobs) for r in one] == [list(r.logprobs) for r in two]


def test_one_turn_is_the_engines_own_rollout(inner, tokenizer, prompts):
    own = sorted(inner.generate(prompts, SAMPLED), key=lambda r: (r.index, r.sample))
    played = play(inner, tokenizer, prompts, lambda problem: lambda messages: None, stop=())
    for one, two in zip(own, played, strict=True):
        assert (one.token_ids, one.logprobs, one.finish_reason) == (
            two.token_ids,
            two.logprobs,
            two.finish_reason,
        )
        assert not two.observed and two.sampled == len(two.token_ids)


def test_the_environment_sees_texts_and_graders_only_what_the_model_wrote(inner, tokenizer, prompts):
    seen = []

    def start(problem):
        return lambda messages: seen.append(messages) or (SAID if len(messages) < 4 else None)

    rollouts = play(inner, tokenizer, prompts, start)
    last = next(m for m in seen if len(m) == 4)
    assert [m["role"] for m in last] == ["user", "assistant", "user", "assistant"] and last[2][
        "content"
    ] == SAID
    for r in (r for r in rollouts if r.observed):
        text = completion_text(tokenizer, r, "r1-zero-short")
        assert "obs" not in text and "<answer>1</answer>" not in text
        assert text.endswith(tokenizer.decode(list(r.turns[-1][1]), skip_special_tokens=True)[-1:])


@pytest.mark.parametrize("which", ["eos", "another"])
def test_a_message_after_an_end_token_is_graded_alone(tokenizer, prompts, which):
    """Whichever of the model's end tokens it is: a tokenizer knows one."""
    others = [i for i in control_tokens(tokenizer) if i != tokenizer.eos_token_id]
    eos = tokenizer.eos_token_id if which == "eos" else others[0]
    first, told, last = (tokenizer.encode(t) for t in ("<answer>3</answer>", "no", "<answer>4</answer>"))
    ids = [*first, eos, *told, *last, eos]
    span = (len(first) + 1, len(first) + 1 + len(told))
    made = Rollout(prompts[0], 0, 0, ids, [0.0] * len(ids), "stop", observed=(span,))
    assert completion_text(tokenizer, made, "r1-zero-short") == "<answer>4</answer>"
    assert "3" in completion_text(
        tokenizer, replace(made, token_ids=[*first, 5, *ids[len(first) + 1 :]]), "raw"
    )


@pytest.mark.parametrize("template", ["r1", "plain", "boxed-think"])
def test_the_markup_of_the_next_message_is_the_chat_templates(tokenizer, template):
    text = next_turn(tokenizer, "seen", template, tokenizer.eos_token)
    assert text.startswith("<｜User｜>seen") and text.count("<｜Assistant｜>") == 1
    assert text.endswith("<think>\n") == (template != "plain")


def raising(problem):
    def step(messages):
        raise RuntimeError("no such move\nmore")

    return step


def test_an_environment_that_raises_or_gives_nonsense_fails_by_name(inner, tokenizer, prompts):
    for start, says in (
        (raising, "RuntimeError: no such move"),
        (lambda problem: lambda messages: float("nan"), "score nan is no finite number"),
        (lambda problem: lambda messages: ["a"], "TypeError"),
        (lambda problem: 1 / 0, "ZeroDivisionError"),
        (lambda problem: lambda messages: "\ud800", "lone surrogate"),
    ):
        failed = [r for r in play(inner, tokenizer, prompts, start) if r.finish_reason == "stop"]
        assert failed and all(says in r.failure and "\n" not in r.failure for r in failed)


def test_one_that_hangs_is_given_up_once_and_the_others_count(inner, tokenizer, prompts):
    forever = threading.Event()

    def start(problem):
        return lambda messages: forever.wait(60) and None if problem.id == "0" else None

    rollouts = play(inner, tokenizer, prompts, start, timeout_s=0.3)
    forever.set()
    hung = [r for r in rollouts if r.failure]
    assert hung and {r.index for r in hung} == {0} and "no answer within 0.3 s" in hung[0].failure


def test_a_machine_without_threads_left_fails_rollouts_by_name(inner, tokenizer, prompts, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    asked = [r for r in play(inner, tokenizer, prompts, lambda problem: lambda messages: "") if r.failure]
    assert asked and all("can't start new thread" in r.failure for r in asked)


def test_limits_cut(inner, tokenizer, prompts):
    endless = play(inner, tokenizer, prompts, lambda problem: lambda messages: "a", max_turns=3)
    assert all(r.finish_reason == "length" and len(r.observed) <= 2 for r in endless)
    assert any(len(r.observed) == 2 for r in endless)
    flood = play(inner, tokenizer, prompts, lambda problem: lambda messages: "a" * 3_000_000)
    assert all(r.finish_reason == "length" and not r.observed for r in flood)
    mute = play(inner, tokenizer, prompts, lambda problem: lambda messages: "", max_turns=40)
    assert all(not r.observed and not r.failure for r in mute)
    scored = play(inner, tokenizer, prompts, lambda problem: lambda messages: 0.5)
    assert {r.score for r in scored if r.finish_reason == "stop"} == {0.5}


def test_routes_cover_every_token_but_the_last(tokenizer, prompts):
    net = Transformer(
        tiny(len(tokenizer), eos_token_id=tokenizer.eos_token_id, initializer_range=0.1), seed=0
    )
    engine = Recording(NativeEngine(net.eval(), tokenizer=tokenizer, record_routes=True))
    rollouts = play(engine, tokenizer, prompts)
    assert any(r.observed for r in rollouts)
    for r in rollouts:
        assert len(r.routed_experts) == len(r.prompt.token_ids) + len(r.token_ids) - 1
        firsts = [t for t in engine.requests[0][2] if (t.index, t.sample) == (r.index, r.sample)]
        assert torch.equal(r.routed_experts[: len(firsts[0].routed_experts)], firsts[0].routed_experts)
