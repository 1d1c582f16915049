"""Recorded experts in training: repeated exactly, compared exactly, and refused where they are another's."""

import dataclasses

import pytest
import torch
from model_shapes import BASE, make

from model.dense import DensePolicy
from model.kernels.packed import Packed
from model.moe import balance_loss
from rollout.native.engine import NativeEngine
from rollout.types import SamplingParams
from tests.small import llama, prompt

LAYERS, K, EXPERTS = *BASE.routed_shape, BASE.n_routed_experts
LENGTHS = (5, 9, 1, 6)


def row(seed=0, missing=()):
    """Token ids of one packed row, and experts that nobody would choose; those `missing` are not recorded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(BASE.vocab_size, (1, sum(LENGTHS)), generator=generator)
    scores = torch.rand(1, sum(LENGTHS), LAYERS, EXPERTS, generator=generator)
    routes = scores.topk(K, dim=-1).indices.to(torch.int16)
    routes[:, list(missing)] = -1
    return tokens, routes


def chosen_by(net, tokens, routes):
    """The experts that each layer of a forward computes with (layers, t, k), and its states."""
    found = []
    hooks = [moe.register_forward_hook(lambda _, __, out: found.append(out[1])) for moe in net.moe_layers()]
    states = net.hidden(tokens, Packed.of(LENGTHS), routes)
    for hook in hooks:
        hook.remove()
    return torch.stack(found), states


def gates_choices(net, tokens, routes):
    """What each layer's gate itself would choose in a forward with `routes`."""
    found = []

    def look(gate, _, out):
        found.append(gate.select(out[2]))

    hooks = [moe.gate.register_forward_hook(look) for moe in net.moe_layers()]
    net.hidden(tokens, Packed.of(LENGTHS), routes)
    for hook in hooks:
        hook.remove()
    return found


def test_the_trainer_repeats_the_engines_path_where_its_own_gates_have_changed():
    """The biases of the gates choose and do not weigh: with the recorded experts the engine's own
    log-probabilities come back, although each gate would now choose otherwise."""
    net = make(BASE).eval()
    engine = NativeEngine(net, record_routes=True, eos_token_id=())
    rollouts = list(engine.generate([prompt(5, 6, 7), prompt(9, 8)], SamplingParams(max_tokens=12, n=2)))
    with torch.no_grad():
        for moe in net.moe_layers():
            moe.gate.e_score_correction_bias += torch.linspace(-1, 1, EXPERTS)
    for r in rollouts:
        ids = torch.tensor([[*r.prompt.token_ids, *r.token_ids]])
        at = torch.arange(len(r.prompt.token_ids) - 1, ids.shape[1] - 1)
        last = torch.full((1, LAYERS, K), -1, dtype=torch.int16)  # no layer of the engine read it
        routes = torch.cat([r.routed_experts.short(), last])[None]
        for given, same in ((routes, True), (None, False)):
            logits = net.head(net.hidden(ids, routed_experts=given))[0, at].log_softmax(-1)
            gap = logits.gather(1, ids[0, at + 1, None]).squeeze(1) - torch.tensor(list(r.logprobs))
            assert bool(gap.abs().max() < 1e-5) is same
        assert r.routed_experts.dtype == torch.uint8


@pytest.mark.parametrize("recompute", [False, True])
def test_differences_are_counted_as_a_loop_counts_them(recompute):
    """Once a training forward, replayed or not, of recorded tokens alone; scoring does not count."""
    net = make(BASE).train()
    net.recompute, net.balance_alpha = recompute, 1.0
    tokens, routes = row(missing=(3, 20))
    for replay in (False, True):
        net.router_replay = False
        own, _ = chosen_by(net.eval(), tokens, None)
        net.train().router_replay = replay
        if replay:  # behind the first layer the states are those of the replayed experts
            own = gates_choices(net.eval(), tokens, routes)
            net.train()
        affinities = []
        hooks = [
            m.gate.register_forward_hook(lambda _, __, out, to=affinities: to.append(out[2]))
            for m in net.moe_layers()
        ]
        used, states = chosen_by(net, tokens, routes)
        for hook in hooks:
            hook.remove()
        differ = compared = 0
        for layer in range(LAYERS):
            for t in range(tokens.shape[1]):
                recorded = set(routes[0, t, layer].tolist())
                if recorded != {-1}:
                    differ += len(set(own[layer][t].tolist()) - recorded)
                    compared += K
                    assert (set(used[layer][t].tolist()) == recorded) is replay or not replay
        states.sum().backward()  # with recompute: a second forward
        load = [torch.bincount(of.flatten(), minlength=EXPERTS) for of in used]
        assert torch.equal(net.router_load()[:LAYERS], torch.stack(load))
        packed = Packed.of(LENGTHS)
        balance = sum(balance_loss(s, used[0], packed.index, len(LENGTHS)) for s in affinities)
        assert net.pop_balance_loss().item() == pytest.approx(balance.item(), rel=1e-6)
        assert 0.2 < differ / compared < 0.95
        assert net.after_update(0.0)["policy/experts_differ"] == pytest.approx(differ / compared, abs=1e-12)
        with torch.no_grad():
            net.hidden(tokens, Packed.of(LENGTHS), routes)
        assert "policy/experts_differ" not in net.after_update(0.0)


def test_gradient_flows_through_the_gate_values_of_the_experts_that_are_replayed():
    """Against finite differences, behind affinities in fp32; the gate itself would choose others."""
    net = make(BASE).double().train()
    tokens, routes = row()

    def loss():
        return net.hidden(tokens, Packed.of(LENGTHS), routes).square().sum()

    loss().backward()
    weight = net.moe_layers()[0].gate.weight
    grad = weight.grad.clone()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.double)
        values = []
        for step in (3e-3, -3e-3):
            with torch.no_grad():
                weight += step * direction
                values.append(loss().item())
                weight -= step * direction
        want = (values[0] - values[1]) / 6e-3
        assert (grad * direction).sum().item() == pytest.approx(want, rel=1e-3) and abs(want) > 1


def test_routes_of_another_model_are_refused():
    net = make(BASE)
    _, routes = row()
    fits = routes[0, :7]
    net.check_routes(fits, 8)
    wrong = dataclasses.replace(BASE, n_routed_experts=EXPERTS // 2, n_group=1, topk_group=1)
    for policy, given, why in (
        (net, fits[:-1], f"6 x {LAYERS} x {K} ids, not 7 x {LAYERS} x {K} "),
        (net, fits[:, :1], f"7 x 1 x {K} ids, not"),
        (net, fits[..., :1], f"7 x {LAYERS} x 1 ids, not"),
        (
            make(wrong),
            fits,
            f"ids from 0 to {EXPERTS - 1}, and its layers have experts 0 to {EXPERTS // 2 - 1}",
        ),
        (DensePolicy(llama()), fits, "it has no experts"),
    ):
        with pytest.raises(ValueError, match=why):
            policy.check_routes(given, 8)
