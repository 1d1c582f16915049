"""`--inject`: each fault is named by the run within two steps, and by `doctor` from its folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.transformer import Transformer
from pipeline.__main__ import main
from pipeline.doctor import live
from pipeline.doctor.gaps import causes, signature
from pipeline.doctor.inject import FaultyEngine
from pipeline.doctor.live import LiveDoctor
from rollout.native.engine import NativeEngine
from rollout.types import SamplingParams
from tests.small import random_policy, random_prompts

CAUSES = {"stale": "stale_weights", "fp8": "precision", "route": "routes", "eos": "eos"}


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return random_policy(tmp_path_factory.mktemp("policy"), tokenizer, "r1-zero-short", initializer_range=0.1)


@pytest.fixture
def zero(policy, tmp_path, capsys):
    """`zero(*flags)`: the console and the folder of a run of two steps."""

    def run(*flags):
        settings = {
            "init-from": policy, "template": "r1-zero-short", "problems": "generator:sum", "pool": 24,
            "eval-every": 0, "steps": 2, "prompts-per-step": 12, "group-size": 8, "max-tokens": 24,
            "kl-coef": 0, "threads": 1, "optim.lr": 1e-2, "max-mismatch-kl": 9, "runs": tmp_path, "name": "x",
        }  # fmt: skip
        given = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        (tmp_path / "zero.toml").write_text("[rewards]\nlanguage = 1.0\n")
        code = main(["zero", "--config", str(tmp_path / "zero.toml"), *given, *map(str, flags)])
        assert code == (3 if "--max-mismatch-kl" in flags else 0)
        return capsys.readouterr().out, tmp_path / "x" / "zero"

    return run


@pytest.mark.parametrize("fault", ["", *CAUSES])
def test_the_cause_is_named_within_two_steps_and_from_the_folder(zero, capsys, fault):
    out, run = zero("--inject", fault) if fault else zero()
    assert ("FAULTY ON PURPOSE" in out) == bool(fault)
    named = {kind for kind in [*CAUSES.values(), "template"] if f": {kind}: " in out}
    assert named == ({CAUSES[fault]} if fault else set()), "the console"
    assert main(["doctor", str(run)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert {each["kind"] for each in found} & {*CAUSES.values(), "template"} == named
    card = (run / "model" / "README.md").read_text()
    assert (f"with a fault on purpose: {fault}" in card) == bool(fault)


def test_rollouts_that_are_old_on_purpose_are_no_fault(zero, capsys):
    """Neither to the run nor to `doctor`, and the bound on the mismatch names them."""
    out, run = zero("--staleness", 3, "--steps", 6)
    assert not any(f": {kind}: " in out for kind in [*CAUSES.values(), "template"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["rollout/staleness"] == 3 and rows[-1]["policy/mismatch_kl"] > 1e-3
    assert main(["doctor", str(run)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert not {each["kind"] for each in found} & {*CAUSES.values(), "template", "temperature"}


@pytest.mark.parametrize(("stale", "step", "named"), [(0, 5, True), (1, 1, True), (1, 5, False)])
def test_a_resumed_run_with_old_rollouts_takes_them_for_nothing_else(capsys, stale, step, named):
    """Its first step has a gap already. In one that began so, the gap is the engine's rounding."""
    random = torch.Generator().manual_seed(0)
    logprobs, noise = -torch.rand(512, generator=random), 1e-2 * torch.randn(512, generator=random)
    rollout, gains = torch.arange(512) // 4, torch.randn(128, generator=random).repeat_interleave(4)
    part = SimpleNamespace(rollout_logprobs=logprobs + noise, advantages=gains, rollout=rollout)
    doctor = LiveDoctor(frozenset(), bool(stale))
    doctor.rollouts(step, [])
    assert doctor.gaps(1e-3, [(part, logprobs)])
    assert ("precision" in doctor.named) == ("precision" in capsys.readouterr().out) == named
    assert len(doctor.named) == named


def test_of_a_large_step_a_part_is_looked_at(monkeypatch):
    """Evenly spaced micro-batches, always the same; what is left out may be anything."""
    random, seen = torch.Generator().manual_seed(0), []
    monkeypatch.setattr(live, "MOST", 100)
    monkeypatch.setattr(live, "signature", lambda engine, *rest: seen.append(len(engine)) or {})
    for parts, looked_at in ((4, 2), (1, 1), (7, 2)):
        scored = []
        for _ in range(parts):
            logprobs = -torch.rand(48, generator=random)
            rollout = torch.arange(48) // 4
            part = SimpleNamespace(rollout_logprobs=logprobs, advantages=logprobs, rollout=rollout)
            scored.append((part, logprobs))
        LiveDoctor(frozenset(), False).gaps(1e-3, scored)
        assert seen[-1] == 48 * looked_at


def test_a_run_that_stops_at_its_first_step_leaves_the_cause(zero, capsys):
    _, run = zero("--inject", "fp8", "--max-mismatch-kl", 1e-6)
    assert main(["doctor", str(run)]) == 0
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert "precision" in [each["kind"] for each in findings]


def test_an_engine_with_another_template_reads_other_prompts(policy):
    """The rollouts' prompts stay those that were asked for, and their text is that of shorter ones."""
    params = SamplingParams(max_tokens=6, n=2, temperature=0)
    net = Transformer.load(policy).eval()
    asked = random_prompts(net.config.vocab_size, [5, 9])
    got = list(FaultyEngine(NativeEngine(net), "template").generate(asked, params))
    short = [type(p)(p.problem, p.template, p.token_ids[:-1]) for p in asked]
    due = {(r.index, r.sample): r.token_ids for r in NativeEngine(net).generate(short, params)}
    assert {(r.index, r.sample): r.token_ids for r in got} == due
    assert all(r.prompt == asked[r.index] for r in got)


def test_a_gap_at_first_tokens_is_another_prompt_where_that_may_be_claimed():
    rng = np.random.default_rng(0)
    engine = -rng.exponential(1, 64 * 16)
    trainer = engine + rng.normal(0, 0.05, len(engine))
    starts = np.arange(0, len(engine), 16)
    trainer[starts] -= 4
    found = signature(engine, np.minimum(trainer, -1e-6), starts, np.zeros(64))
    assert causes(found, template=True) == ["template"]
    assert causes(found, template=False) != ["template"]


@pytest.mark.parametrize("flags", [("--rollout.workers", 1), ("--rollout.engine", "vllm")])
def test_faults_are_for_an_engine_in_this_process(capsys, tmp_path, flags):
    (tmp_path / "zero.toml").touch()
    argv = ["zero", "--config", tmp_path / "zero.toml", "--inject", "stale", *flags]
    assert main([*map(str, argv)]) == 2
    assert "in the trainer's process" in capsys.readouterr().err


def test_a_recorded_step_is_examined_whole_and_a_damaged_one_is_named(zero, capsys):
    _, run = zero("--record", 2, "--log-samples", 0)
    assert main(["doctor", str(run)]) == 0
    assert f"{run}: 96 rollouts, 2 steps" in capsys.readouterr().out
    (run / "recorded-2" / "state.pt").write_bytes(b"torn")
    assert main(["doctor", str(run)]) == 2
    said = capsys.readouterr().err
    assert "recorded-2" in said and said.count("\n") == 1
