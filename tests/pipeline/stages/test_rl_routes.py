"""RL with an engine in bf16 beside a trainer in fp32: recorded experts from sampling to the update."""

from __future__ import annotations

import dataclasses
import json
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from pipeline.__main__ import main
from pipeline.train.pack import pack
from pipeline.train.rollouts import example
from rollout.collect import Round
from rollout.local import load_policy
from rollout.open import engine_for
from rollout.settings import RolloutSettings
from rollout.text.tokenizer import load_tokenizer
from rollout.types import Graded, Problem, Prompt, Rollout, SamplingParams
from tests.small import llama, random_policy

BF16 = ("--rollout.dtype", "bfloat16", "--rollout.routed-experts")


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return random_policy(folder, tokenizer, "r1-zero-short", initializer_range=0.1)


def rl(policy, runs, name, *extra):
    """R1-Zero on the micro preset: exit code, and metrics of its steps."""
    argv = ["zero", "--config", "configs/micro/zero.toml", "--runs", runs, "--name", name, "--threads", 1]
    argv += ["--init-from", policy, "--optim.lr", "1e-3", "--rewards.language", 1, "--eval-every", 0, *extra]
    code = main(list(map(str, argv)))
    file = runs / name / "zero/metrics.jsonl"
    return code, [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_replay_takes_away_what_the_routes_add_to_the_mismatch(policy, tmp_path):
    found = {}
    for name, flags in (("without", BF16), ("with", (*BF16, "--router-replay"))):
        code, rows = rl(policy, tmp_path, name, "--steps", 2, "--minibatches", 2, *flags)
        assert code == 0 and all(0 < row["policy/experts_differ"] < 0.2 for row in rows)
        assert [row["rollout/version"] for row in rows] == [0, 2]  # the copy has the weights of each step
        found[name] = fmean(row["policy/mismatch_kl"] for row in rows)
    assert 1e-7 < found["with"] < found["without"] / 1.2
    code, rows = rl(policy, tmp_path, "plain", "--steps", 1)
    assert "policy/experts_differ" not in rows[0] and rows[0]["policy/mismatch_kl"] < 1e-9


def test_killed_and_resumed_it_is_the_same_run_to_the_bit(policy, tmp_path):
    """With a round that was sampled ahead, its routes in the checkpoint, and modules that learn."""
    flags = (*BF16, "--router-replay", "--mtp-coef", 0.1, "--rollout.local.speculate")
    flags += ("--staleness", 1, "--steps", 4, "--checkpoint-every", 2)
    code, logged = rl(policy, tmp_path, "whole", *flags)
    assert code == 0 and all(0 <= row["rollout/mtp_acceptance"] <= 1 for row in logged)
    run, again = tmp_path / "whole/zero", tmp_path / "again/zero"
    again.mkdir(parents=True)
    for file in ("config.toml", "env.json", "metrics.jsonl", "samples.jsonl", "latest"):
        text = (run / file).read_text()
        (again / file).write_text(text.replace('name = "whole"', 'name = "again"'))
    (again / "checkpoint-2").symlink_to(run / "checkpoint-2")
    code, resumed = rl(policy, tmp_path, "again", *flags, "--resume")
    for one, two in zip(logged, resumed, strict=True):
        for key in ("policy/mismatch_kl", "policy/experts_differ", "optim/grad_norm", "loss/mtp"):
            assert one[key] == two[key], (one["step"], key)
    first, second = (load_file(r / "model/model.safetensors") for r in (run, again))
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_routes_come_back_from_a_worker(policy, tmp_path):
    code, rows = rl(policy, tmp_path, "pool", "--steps", 1, "--router-replay", "--rollout.workers", 1)
    assert code == 0 and rows[0]["policy/experts_differ"] < 1e-3 and rows[0]["policy/mismatch_kl"] < 1e-9


def made(routes, tokens=(4, 5)):
    prompt = Prompt(Problem("p", "math", ""), "raw", (1, 2, 3))
    return Rollout(prompt, 0, 0, tokens, (-1.0,) * len(tokens), "length", routed_experts=routes)


def test_routes_survive_a_checkpoint_and_lie_at_their_tokens():
    """Two rollouts in one row, the first without routes; the last token of each has none."""
    routes = torch.arange(4 * 2 * 3, dtype=torch.uint8).view(4, 2, 3)
    done = Round((Graded(made(None, (7,)), ""), Graded(made(routes), "")), 1, 1)
    kept = Round.from_plain(done.plain())
    got = kept.graded[1].rollout.routed_experts
    assert (
        kept.graded[0].rollout.routed_experts is None
        and torch.equal(got, routes)
        and got.dtype == torch.uint8
    )
    batch = pack([example(g.rollout, 1.0, 0.5) for g in kept.graded], 100)
    (micro,) = batch.micro_batches()
    order = [len(e.token_ids) for e in batch.parts[0]]
    assert sorted(order) == [4, 5] and micro.routed_experts.shape == (1, 9, 2, 3)
    begin = 0 if order[0] == 5 else 4
    assert torch.equal(micro.routed_experts[0, begin : begin + 4], routes.short())
    assert (micro.routed_experts[0] == -1).all((1, 2)).sum() == 5
    (plain,) = pack([example(made(None), 1.0, 0.5)], 100).micro_batches()
    assert plain.routed_experts is None


@pytest.mark.parametrize("fault", ["layers", "ids", "none"])
def test_routes_of_another_model_end_the_run_with_one_line(policy, tmp_path, monkeypatch, capsys, fault):
    from rollout.native.engine import NativeEngine

    real = NativeEngine.generate

    def generate(self, prompts, sampling):
        for r in real(self, prompts, sampling):
            routes = r.routed_experts
            wrong = {"layers": routes.repeat(1, 2, 1), "ids": routes + 8, "none": None}[fault]
            yield dataclasses.replace(r, routed_experts=wrong)

    monkeypatch.setattr(NativeEngine, "generate", generate)
    code, _ = rl(policy, tmp_path, "wrong", "--steps", 1, "--router-replay")
    err = capsys.readouterr().err
    why = {"layers": "2 x 2 ids, not ", "ids": "layers have experts 0 to 7", "none": "did not record"}[fault]
    assert code == 2 and err.count("\n") == 1 and why in err and "--no-router-replay" in err
    assert "recorded for prompt 0, sample 0, are not this policy's" in err


def test_a_dense_policy_has_no_routes_to_replay(tokenizer, tmp_path, capsys):
    net = llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    net.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    capsys.readouterr()  # the bars of saving
    for flags, why in (("--router-replay",), "is for native policies"), (("--mtp-coef", 0.1), "MTP modules"):
        code, _ = rl(tmp_path / "dense", tmp_path, f"dense{len(flags)}", "--steps", 1, *flags)
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and why in err


@pytest.mark.parametrize("kind", ["native", "dense"])
def test_an_engine_of_another_type_has_a_copy_that_follows(policy, tokenizer, tmp_path, kind):
    """It rounds what the trainer holds, at the opening and after each update."""
    path = policy
    if kind == "dense":
        path = tmp_path / "dense"
        llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(path)
        tokenizer.save_pretrained(path)
    net = load_policy(path)
    settings = RolloutSettings(dtype="bfloat16")
    engine = engine_for(net, load_tokenizer(path), settings, path, "float32")
    request = [made(None).prompt], SamplingParams(max_tokens=6, temperature=0.0)

    def same_as_rounded(version):
        ((r,), mine) = list(engine.generate(*request)), dict(engine.policy.public_weights())
        for name, tensor in net.public_weights():
            kept = name.endswith("e_score_correction_bias")
            assert mine[name].dtype == (torch.float32 if kept else torch.bfloat16)
            assert torch.equal(mine[name], tensor if kept else tensor.bfloat16())
        assert r.policy_version == version and not engine.in_place
        return list(r.logprobs)

    first = same_as_rounded(0)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    engine.load_weights(net, 3)
    assert same_as_rounded(3) != first
    for trained, dtype in (("float32", "auto"), ("float32", "float32"), ("fp8", "fp8"), ("fp8", "auto")):
        assert (
            engine_for(net, load_tokenizer(path), RolloutSettings(dtype=dtype), path, trained).policy is net
        )
