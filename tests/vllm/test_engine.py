"""The vLLM engine's own promises: seeds, stopping, updates that are proven live, and every way to fail."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from networks import LENGTHS, MOE, network

import model
from rollout.engine import EngineDied, StaleWeights
from rollout.settings import RolloutSettings, VllmSettings
from rollout.text.tokenizer import train_tokenizer
from rollout.types import SamplingParams
from rollout.vllm.self_test import compare
from rollout.weights import fingerprint
from tests.rollout.test_in_flight import check, of_tokens, renewing
from tests.small import prompt, random_prompts

SAMPLED = SamplingParams(max_tokens=20, n=3, seed=11)
GREEDY = replace(SAMPLED, temperature=0.0, n=1, ignore_eos=True)
PROMPTS = random_prompts(MOE.vocab_size, LENGTHS)


@pytest.fixture(scope="module")
def policies():
    return network(MOE, seed=0), network(MOE, seed=1)


@pytest.fixture(scope="module")
def folder(policies, tmp_path_factory):
    path = tmp_path_factory.mktemp("moe")
    model.save(policies[0], path)
    return path


@pytest.fixture(scope="module")
def engine(folder, policies):
    from rollout.vllm.engine import VllmEngine

    opened = VllmEngine(folder, policy=policies[0])
    yield opened
    opened.close()
    opened.close()


@pytest.fixture(autouse=True)
def weights_as_opened(request, policies):
    """Whatever a test loaded, the next begins with the checkpoint's weights."""
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").load_weights(policies[0], version=0)


def tokens(rollouts):
    named = {(r.index, r.sample): (tuple(r.token_ids), r.finish_reason) for r in rollouts}
    assert len(named) == len(rollouts)
    return named


def test_a_rollout_does_not_depend_on_its_company(engine):
    """Fewer prompts, fewer samples, a part of the request: the same rollouts."""
    want = tokens(list(engine.generate(PROMPTS, SAMPLED)))
    assert len(want) == 24 and len({ids for ids, _ in want.values()}) >= 23
    assert tokens(list(engine.generate(PROMPTS, SAMPLED))) == want
    few = tokens(list(engine.generate(PROMPTS[:3], replace(SAMPLED, n=1))))
    assert few == {key: value for key, value in want.items() if key[0] < 3 and key[1] == 0}
    part = tokens(list(engine.generate(PROMPTS[4:6], replace(SAMPLED, first_index=4))))
    assert part == {(i - 4, s): value for (i, s), value in want.items() if i in (4, 5)}
    other = tokens(list(engine.generate(PROMPTS, replace(SAMPLED, seed=12))))
    assert sum(other[key][0] == want[key][0] for key in want) <= 1


def test_stopping(engine):
    """Every rollout is the one that never stops, cut after its first stop token, which it keeps."""
    endless = tokens(list(engine.generate(PROMPTS, replace(SAMPLED, ignore_eos=True))))
    assert all(len(ids) == 20 and reason == "length" for ids, reason in endless.values())
    stops = {2, *range(100, 130)}  # 2 is the model's eos
    got = tokens(list(engine.generate(PROMPTS, replace(SAMPLED, stop_token_ids=tuple(range(100, 130))))))
    for key, (ids, _) in endless.items():
        at = next((i for i, token in enumerate(ids) if token in stops), None)
        assert got[key] == ((ids, "length") if at is None else (ids[: at + 1], "stop"))
    assert {reason for _, reason in got.values()} == {"stop", "length"}


def test_more_prompt_tokens_than_a_step_reads(engine):
    """Prompts are never read in parts: their generators cannot be rewound between them."""
    many = random_prompts(MOE.vocab_size, lengths=[400] * 30)
    params = replace(SAMPLED, n=1, max_tokens=4, ignore_eos=True)
    got = tokens(list(engine.generate(many, params)))
    alone = tokens(list(engine.generate(many[20:22], replace(params, first_index=20))))
    assert alone == {(i - 20, s): value for (i, s), value in got.items() if i in (20, 21)}


def test_min_tokens(engine):
    params = replace(SAMPLED, stop_token_ids=tuple(range(2, 300)), min_tokens=5)
    got = tokens(list(engine.generate(PROMPTS, params)))
    assert all(len(ids) > 5 and not set(ids[:5]) & set(range(2, 300)) for ids, _ in got.values())


def test_a_stop_string_ends_a_rollout_that_is_complete_up_to_it(engine, folder):
    """Refused without a tokenizer; with one, the rollout without stops, cut where a string is complete."""
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        engine.generate(PROMPTS, replace(SAMPLED, stop=("a",)))
    tokenizer = train_tokenizer(["Hello world, what is it? 3+4=7, 12.5 (about): a*b = c/d."] * 20, 400)
    tokenizer.save_pretrained(folder)
    try:
        endless = tokens(list(engine.generate(PROMPTS, replace(SAMPLED, ignore_eos=True))))
        texts = [tokenizer.decode(ids) for ids, _ in endless.values()]
        pairs = {t[i : i + 2] for t in texts[:8] for i in (3, 6, 9)}
        stops = tuple(sorted(s for s in pairs if len(s) == 2 and s.isascii()))
        got = tokens(list(engine.generate(PROMPTS, replace(SAMPLED, stop=stops, stop_token_ids=()))))
        cut = 0
        for key, (ids, _) in endless.items():
            ids = ids[: ids.index(2) + 1] if 2 in ids else ids
            cuts = (n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stops))
            end = next(cuts, None)
            cut += end is not None
            assert got[key][0] == (ids if end is None else ids[:end])
            assert (got[key][1] == "stop") == (end is not None or ids[-1] == 2)
        assert cut >= 5
    finally:
        for file in folder.glob("*token*"):
            file.unlink()


def test_the_context_caps_completions(engine):
    room = MOE.max_position_embeddings
    long = [prompt(*range(3, 3 + room - n)) for n in (1, 5)]
    got = tokens(list(engine.generate([*long, PROMPTS[0]], GREEDY)))
    assert [len(got[i, 0][0]) for i in range(3)] == [1, 5, 20]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((), "prompt 1 has no tokens"),
        (range(3, 3 + MOE.max_position_embeddings), "prompt 1 has 512 tokens.*at most 511"),
        ((3, MOE.vocab_size), "prompt 1 has token id 640"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_generated(engine, bad, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt(3), prompt(*bad)], GREEDY)


def test_updates_go_back_and_forth_and_are_proven_live(engine, policies):
    """A -> B -> A -> B: each time vLLM generates as the policy would, and reports its weights."""
    expected = [fingerprint(tensor for _, tensor in p.public_weights()) for p in policies]
    assert expected[0] != expected[1]
    by_policy = {}
    for version, which in enumerate((0, 1, 0, 1), start=1):
        engine.load_weights(policies[which], version)
        assert engine.version == version and engine.weights == engine.live_weights() == expected[which]
        rollouts = list(engine.generate(PROMPTS, GREEDY))
        assert {r.policy_version for r in rollouts} == {version}
        found = compare(rollouts, policies[which])
        assert found.regret == 0 and found.worst < 1e-5
        assert by_policy.setdefault(which, tokens(rollouts)) == tokens(rollouts)
    assert by_policy[0] != by_policy[1]


def test_weights_in_the_middle_of_a_request_hold_from_the_next_token_on(engine, policies, monkeypatch):
    """For keys and values too: rollouts under way are prefilled again."""
    monkeypatch.setattr(engine, "renew", engine.renew)  # to be put back

    def logprobs(ids, p, s):
        each = [policy.logits(torch.tensor([ids]))[0, p - 1 : -1] for policy in policies]
        return of_tokens(torch.cat([each[0][:s], each[1][s:]]), ids, p)

    sampled = replace(SAMPLED, ignore_eos=True)
    got = list(renewing(engine, policies[1], 9).generate(PROMPTS, sampled))
    assert len(got) == 3 * len(PROMPTS) == check(got, logprobs)


def test_one_changed_number_changes_the_fingerprint(engine, policies):
    net = network(MOE, seed=0)
    engine.load_weights(net, 1)
    for tensor in (
        net.layers[1].mlp.experts.down_proj,
        net.norm.weight,
        net.layers[0].self_attn.o_proj.weight,
    ):
        before = engine.weights
        with torch.no_grad():
            tensor[(0,) * tensor.dim()] += 1e-4
        engine.load_weights(net, 2)
        assert engine.weights != before and engine.live_weights() == engine.weights


def test_an_update_that_does_not_arrive_is_noticed(engine, policies, monkeypatch):
    """Stale weights: every bucket is answered, one is not loaded, and the layers keep what they had."""
    import rollout.vllm.engine as ours
    from rollout.vllm.worker import WorkerWeights

    bucket, index = WorkerWeights.r1_bucket, itertools.count()

    def lost(self, message):
        return self.r1_receiver.read(message)[1] if next(index) == 40 else bucket(self, message)

    monkeypatch.setattr(ours, "BUCKET_BYTES", 1 << 16)
    monkeypatch.setattr(WorkerWeights, "r1_bucket", lost)
    with pytest.raises(StaleWeights, match="after the update to version 1 vLLM holds weights"):
        engine.load_weights(policies[1], 1)
    with pytest.raises(StaleWeights, match="load them before the next request"):
        engine.generate(PROMPTS, GREEDY)
    engine.load_weights(policies[1], 2)
    assert compare(list(engine.generate(PROMPTS, GREEDY)), policies[1]).worst < 1e-5


@pytest.mark.parametrize("at", [0, 3])
def test_a_wrong_byte_in_one_bucket_is_found_and_named(engine, policies, monkeypatch, at):
    import rollout.vllm.engine as ours

    send, index = ours.send, itertools.count()

    def faulty(weights, dtype, outlet, start, copies):
        def flipped(message):
            outlet.flat[77] ^= next(index) == at
            return start(message)

        return send(weights, dtype, outlet, flipped, copies)

    monkeypatch.setattr(ours, "BUCKET_BYTES", 1 << 16)
    monkeypatch.setattr(ours, "send", faulty)
    with pytest.raises(StaleWeights, match=rf"bucket {at} of the weights \(model\..* arrived at rank 0"):
        engine.load_weights(policies[1], 1)
    monkeypatch.setattr(ours, "send", send)
    engine.load_weights(policies[1], 2)
    assert compare(list(engine.generate(PROMPTS, GREEDY)), policies[1]).worst < 1e-5


def test_the_same_weights_three_times_are_the_same_policy(engine, policies, monkeypatch):
    """Through many small buckets, so that layers are split over them."""
    import rollout.vllm.engine as ours

    monkeypatch.setattr(ours, "BUCKET_BYTES", 1 << 16)
    want = tokens(list(engine.generate(PROMPTS, GREEDY)))
    for version in (1, 2, 3):
        engine.load_weights(policies[0], version)
        assert tokens(list(engine.generate(PROMPTS, GREEDY))) == want
        assert engine.live_weights() == fingerprint(t for _, t in policies[0].public_weights())


def test_weights_of_another_shape_are_refused_and_the_old_ones_stay(engine, policies):
    before = engine.live_weights()
    other = network(replace(MOE, moe_intermediate_size=64), seed=0)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight is \(128, 64\).*\(128, 96\)"):
        engine.load_weights(other, 1)
    assert engine.live_weights() == before and engine.version == 0
    assert compare(list(engine.generate(PROMPTS, GREEDY)), policies[0]).worst < 1e-5


def test_nan_weights_are_named_and_the_engine_goes_on(engine, policies):
    broken = network(MOE, seed=0)
    with torch.no_grad():
        broken.lm_head.weight[50] = float("nan")
    engine.load_weights(broken, 1)
    for params in (GREEDY, SAMPLED):
        with pytest.raises(FloatingPointError, match=r"decode step \d+ \(prompt \d+, sample \d+\)"):
            list(engine.generate(PROMPTS, params))
    engine.load_weights(policies[0], 2)
    assert compare(list(engine.generate(PROMPTS, GREEDY)), policies[0]).worst < 1e-5


def test_a_request_that_is_dropped_leaves_nothing_behind(engine, policies):
    stream = engine.generate(PROMPTS, SAMPLED)
    next(stream)
    stream.close()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert compare(list(engine.generate(PROMPTS, GREEDY)), policies[0]).worst < 1e-5


def test_the_trainers_process_is_left_as_it_was(folder, policies):
    """Seeds and threads: vLLM sets both when it starts."""
    from rollout.vllm.engine import VllmEngine

    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    opened = VllmEngine(folder, policy=policies[0])
    opened.close()
    assert torch.get_num_threads() == threads
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm": VllmSettings(sleep="on")}, "vllm.sleep = on: vLLM's CPU build does not have it; set"),
        ({"vllm": VllmSettings(quantization="fp8")}, "vllm.quantization: vLLM's CPU build"),
        ({"vllm": VllmSettings(kv_dtype="fp8")}, "vllm.kv_dtype: vLLM's CPU build"),
        ({"routed_experts": True}, r"rollout.routed_experts \(router_replay\): vLLM's CPU build"),
    ],
)
def test_what_the_cpu_build_cannot_do_is_refused_by_name(folder, settings, message):
    from rollout.vllm.engine import VllmEngine

    with pytest.raises(ValueError, match=message):
        VllmEngine(folder, RolloutSettings(**settings))


def test_a_crash_in_the_middle_is_one_clear_error(folder, policies):
    from rollout.vllm.engine import VllmEngine

    opened = VllmEngine(folder, policy=policies[0])
    core = opened.llm.llm_engine.engine_core.engine_core
    step, calls = core.step_fn, itertools.count()

    def dies():
        if next(calls) == 5:
            raise RuntimeError("out of memory, say")
        return step()

    core.step_fn = dies
    with pytest.raises(EngineDied, match=r"8 rollouts unfinished \(RuntimeError: out of memory, say\)"):
        list(opened.generate(PROMPTS, GREEDY))
    with pytest.raises(EngineDied, match="open a new one"):
        opened.generate(PROMPTS, GREEDY)
    opened.close()
    again = VllmEngine(folder, policy=policies[0])
    assert compare(list(again.generate(PROMPTS, GREEDY)), policies[0]).worst < 1e-5
    again.close()


@pytest.mark.parametrize("fault", ["rope", "experts"])
def test_the_self_test_refuses_vllms_silent_faults(folder, fault, monkeypatch):
    """Without each workaround: either vLLM is refused, or it no longer needs the workaround."""
    import rollout.vllm.engine as ours
    import rollout.vllm.worker as worker

    if fault == "rope":
        original = ours.llm_options
        monkeypatch.setattr(ours, "llm_options", lambda *args: original(*args) | {"compilation_config": {}})
        when = "as loaded"
    else:
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
            UnquantizedFusedMoEMethod as Method,
        )

        worker.repack_experts_on_reload()
        monkeypatch.setattr(Method, "_setup_kernel", Method._setup_kernel.__wrapped__)
        monkeypatch.setattr(worker, "repack_experts_on_reload", lambda: None)
        when = "after an update"
    with pytest.raises(StaleWeights, match=f"is not our model, {when}"):
        ours.VllmEngine(folder)
