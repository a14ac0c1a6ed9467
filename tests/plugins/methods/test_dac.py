"""DAC against its spec's oracles and properties."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.elastic import MODEL
from helpers.oracles import T, close
from hetfl.errors import NotApplicable
from hetfl.models.deep_convnets import MobileNetV2
from hetfl.models.state import tensors
from hetfl.plugins.methods import dac
from hetfl.profiling import cost as cost_
from hetfl.rounds.loop import run_round
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.units import apply_gates, locate_gates


def test_dac_entropy():
    """spec dac O1"""
    for gates, value in (((0.0, 0.0), 0.693147), ((1.0, 1.0), 0.693147), ((1.0, 0.0), 0.582203), ((5.0, 0.0), 0.040180)):
        assert close(dac.entropy({"g": T(gates)}), value)
    w = T([1.0, 0.0]).requires_grad_()
    dac.entropy({"g": w}).backward()
    assert close(w.grad, [-0.196612, 0.196612])
    assert close(dac.entropy({"g": T([0.3, 0.9])}), dac.entropy({"g": T([1.3, 1.9])}))


def test_dac_bound():
    """spec dac O2: the hinge that eq. 2 means, not the one it prints"""
    w = T([1.5, -0.2, 0.5]).requires_grad_()
    loss = dac.hinge({"g": w})
    loss.backward()
    assert close(loss, 0.7)
    assert w.grad.tolist() == [1, -1, 0]
    assert dac.hinge({"g": T([0.0, 1.0, 0.4])}) == 0


def test_dac_prune():
    """spec dac O3"""

    def stays(threshold, *gates):
        return dac.drop_weakest({"g": T(gates)}, dac.count_low({"g": T(gates)}, threshold))["g"].tolist()

    assert stays(0.1, 0.1, 0.1000001, 0.05, 0.9) == [1, 3]
    assert stays(0.1, 0.01, 0.05, 0.02) == [1]
    assert stays(0.1, 0.5, 0.3, 0.9, 0.7) == [0, 1, 2, 3]


def test_a_group_of_one_unit_keeps_nobody_from_pruning():
    """Its gate, low as it is, is not to be removed, so the weakest of the others are next"""
    gates = {"one": T([0.05]), "other": T([0.5, 0.3, 0.9])}
    assert dac.count_low(gates, 0.1) == 0
    assert dac.count_low(gates, float("inf")) == 2
    assert [units.tolist() for units in dac.drop_weakest(gates, 1).values()] == [[0], [0, 2]]


def test_dac_limits_are_strict_for_macs_and_parameters():
    """spec dac 1: while MACs >= M or Params >= P"""
    found = [dac.is_below(cost, (5, 5)) for cost in ((4, 4), (5, 4), (4, 5))]
    assert found == [True, False, False]


class Inverted(nn.Module):
    """An inverted residual block of a = b = 4 channels and h = 8, and a classifier that is not counted."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x):
        return (x + self.block(x)).mean((2, 3))


def test_dac_costs():
    """spec dac O4"""
    model = Inverted().eval()
    widths = trace(model, torch.randn(2, 4, 8, 8))
    x = torch.randn(1, 4, 8, 8)
    hidden = next(g.name for g in widths.groups if g.size == 8)

    def prices(h):
        small = build_submodel(widths, model, {g.name: torch.arange(h if g.name == hidden else g.size) for g in widths.groups})
        conv = sum(p.numel() for p in small.parameters() if p.ndim > 1)
        return conv, cost_.count_parameters(small) - conv, cost_.count_macs(small, x)

    assert prices(8) == (136, 40, 8704)
    assert prices(6) == (102, 32, 6528)


def gate_before(model, name, gate):
    layer = model.get_submodule(name.removesuffix(".weight"))
    return layer.register_forward_pre_hook(lambda m, args: args[0] * gate.reshape(1, -1, *[1] * (args[0].ndim - 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("gates", "number"), [("blocks", 16), ("all", 20)])
def test_dac_gates_stand_before_the_depthwise_filter_and_fold(gates, number):
    """spec dac 2, O6: hidden channels of the 16 blocks that expand; "all" adds the stem, the classifier and two outputs of blocks
    that only the next reads. Channels of residual sums have no gate"""
    torch.manual_seed(0)
    model = MobileNetV2(10, 3, 8).eval()
    widths = trace(model, torch.randn(2, 3, 8, 8))
    places = dac.place_gates(widths, model, gates)
    deep = [place for (place,) in places.values() if place[1] == 0]
    assert len(deep) == (16 if gates == "blocks" else 17)
    assert len(places) == number
    state = tensors(model)
    gates = {g.name: torch.rand(g.size) + 0.2 for g in widths.groups if g.name in places}
    folded = {**state, **apply_gates(state, gates, locate_gates(widths, places))}
    x = torch.randn(2, 3, 8, 8)
    whole = torch.func.functional_call(model, folded, (x,))
    hooks = [gate_before(model, place[0], gates[group]) for group, (place,) in places.items()]
    assert close(model(x), whole.detach(), 1e-5)
    for hook in hooks:
        hook.remove()


def test_dac_gates_of_a_plain_net():
    widths = trace(MODEL, torch.randn(2, 1, 8, 8))
    assert set(dac.place_gates(widths, MODEL)) == {g.name for g in widths.groups}


SMALL = {"model": "mobilenetv2", "model_args": {"width": 0.25, "stages": [[1, 8, 1, 1], [4, 8, 2, 1]], "last": 16}}


def test_dac_keeps_the_widths_of_blocks(simulate):
    """spec dac 2: block input and output widths never change, nor does the stem; a level that this cannot reach is refused"""
    options = {"dac": {"epochs": 1, "patience": 1, "stall": 0.3, "tune": 5}}
    made = simulate(0, extract="dac", aggregate="cluster", levels="1,0.9", set=options, **SMALL)
    run_round(made.state, 1, made.engine)
    kept = made.plugins.plugins["extract.dac"]._kept[0.9]
    hidden = dac.place_gates(made.server.widths, made.server.builder.model)
    cut = {g.name for g in made.server.widths.groups if len(kept[g.name]) < g.size}
    assert len(hidden) == 2
    assert cut
    assert cut <= set(hidden)
    with pytest.raises(NotApplicable, match=r"dac cannot reach level 0.25 .* dac.gates=all"):
        simulate(1, extract="dac", aggregate="cluster", levels="1,0.25", set=options, **SMALL)


def test_dac_gates_start_apart_and_change_nothing(simulate):
    """Alike they would stay: the entropy's gradient is 0 there. Whoever is read by larger weights starts higher"""
    server = simulate(0, extract="dac", aggregate="cluster").server
    alike = T([1.0] * 8).requires_grad_()
    dac.entropy({"g": alike}).backward()
    assert close(alike.grad, [0.0] * 8)
    places = dac.place_gates(server.widths, server.builder.model)
    net = dac.Gated(server.widths.select(torch.arange), server.state, {})
    found = dac.start_gates(server, net, places, 0.4)
    assert [sorted(gate.tolist()) for gate in found.gates.values()] == [pytest.approx(torch.linspace(0.4, 1, n)) for n in (8, 6)]
    assert found.gates["1"].argsort().tolist() == server.state["3.weight"].norm(dim=0).argsort().tolist()
    dac.entropy({name: gate.requires_grad_() for name, gate in found.gates.items()}).backward()
    assert all(gate.grad.abs().max() > 1e-3 for gate in found.gates.values())
    x = torch.randn(3, 1, 8, 8)
    folded = found.scaled(server.widths, places, {name: gate.detach() for name, gate in found.gates.items()})
    assert close(server.logits(folded.state, x), server.logits(server.state, x).detach(), 1e-5)


def test_dac_drops_low_gates_weakest_first_and_no_further_than_to_the_budget(simulate):
    """All of ten units are low; two are enough"""
    server = simulate(0, extract="dac", aggregate="cluster").server
    gates = {"1": torch.linspace(0.01, 0.08, 8), "3": torch.linspace(0.05, 0.1, 6)}
    net = dac.Gated(server.widths.select(torch.arange), server.state, gates)
    budget = tuple(price + 1 for price in dac.measure_cost(server, {"1": 6, "3": 6}))
    left = dac.remove_down_to(server, net, 10, budget)
    assert [units.tolist() for units in left.kept.values()] == [[2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5]]
    assert dac.remove_down_to(server, net, 1, budget).sizes == {"1": 7, "3": 6}


def test_dac_removes_by_gates(simulate, monkeypatch):
    """With the options as they are, gates do reach the threshold, and nearly all that goes goes for that"""
    train, remove, lows, gone = dac.DAC._train_gates, dac.remove_down_to, [], []

    def seen_train(plugin, server, net, *rest):
        after = train(plugin, server, net, *rest)
        lows.append(dac.count_low(after.gates, plugin.threshold))
        return after

    def seen_remove(server, net, number, budget):
        after = remove(server, net, number, budget)
        gone.append(sum(net.sizes.values()) - sum(after.sizes.values()))
        return after

    monkeypatch.setattr(dac.DAC, "_train_gates", seen_train)
    monkeypatch.setattr(dac, "remove_down_to", seen_remove)
    values = {"limit": 400, "server_data": 0.2, "pretrain_steps": 150, "batch_size": 32, "levels": "1,0.5,0.25"}
    simulate(1, extract="dac", aggregate="cluster", model="fedconv-cnn", model_args={}, **values)
    by_gates = sum(number for number, low in zip(gone, lows, strict=True) if low)
    assert sum(low > 0 for low in lows) >= 0.3 * len(lows)
    assert by_gates >= 0.8 * sum(gone)


def test_dac_snapshots_nest_and_stay_below_their_budgets(simulate):
    """spec dac properties"""
    from hetfl.plugins.methods.dac import count_units as lengths
    from hetfl.plugins.methods.dac import measure_cost as price

    made = simulate(extract="dac", aggregate="cluster", levels="1,0.7,0.4", steps=1, set={"dac": {"epochs": 1, "gate_lr": 0.1}})
    plugin = made.plugins.plugins["extract.dac"]
    kept = plugin._kept
    assert list(kept) == [1.0, 0.7, 0.4]
    for large, small in ((1.0, 0.7), (0.7, 0.4)):
        assert all(set(kept[small][name].tolist()) <= set(kept[large][name].tolist()) for name in kept[small])
        budget = price(made.server, {name: len(u) for name, u in made.server.widths.prefix(small).items()})
        ours = price(made.server, lengths(kept[small]))
        assert ours[0] < budget[0]
        assert ours[1] < budget[1]
    assert {"level 0.7", "level 0.4"} <= set(made.server.branches)


class Forked(nn.Module):
    """A hidden layer that two layers read."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(64, 6), nn.Linear(6, 10), nn.Linear(6, 10)

    def forward(self, x):
        h = torch.relu(self.first(x.flatten(1)))
        return self.left(h) + self.right(h)


def test_dac_gates_no_channel_that_two_layers_read():
    widths = trace(Forked(), torch.randn(2, 1, 8, 8))
    assert [g.size for g in widths.groups] == [6]
    assert dac.place_gates(widths, Forked()) == {}


def test_the_control_takes_as_many_steps_as_dacs_search(simulate, monkeypatch):
    train, passes = dac.DAC._train_gates, []
    monkeypatch.setattr(dac.DAC, "_train_gates", lambda *given: passes.append(0) or train(*given))
    made = simulate(0, extract="dac", aggregate="cluster", levels="1,0.7", set={"dac": {"epochs": 2, "gate_lr": 0.1, "tune": 9}})
    before = made.server.steps
    run_round(made.state, 1, made.engine)
    each = 2 * -(-len(made.server.public.tune) // made.options.server_batch_size)
    assert passes
    assert made.server.steps - before == len(passes) * each + 9
