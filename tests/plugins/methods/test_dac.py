"""DAC against its spec's oracles and properties."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.elastic import MODEL
from helpers.oracles import T, close
from hetfl.models.deep_convnets import MobileNetV2
from hetfl.models.state import tensors
from hetfl.plugins.methods import dac
from hetfl.profiling import cost as cost_
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
    assert dac.prune_gates({"g": T([0.1, 0.1000001, 0.05, 0.9])}, 0.1, 0.1)["g"].tolist() == [1, 3]
    assert dac.prune_gates({"g": T([0.01, 0.05, 0.02])}, 0.1, 0.1)["g"].tolist() == [1]
    assert dac.prune_gates({"g": T([0.5, 0.3, 0.9, 0.7])}, 0.1, 0.25)["g"].tolist() == [0, 2, 3]


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
def test_dac_gates_stand_before_the_depthwise_filter_and_fold():
    """spec dac O6; channels of residual sums have no gate"""
    torch.manual_seed(0)
    model = MobileNetV2(10, 3, 8).eval()
    widths = trace(model, torch.randn(2, 3, 8, 8))
    places = dac.place_gates(widths, model)
    deep = [place for (place,) in places.values() if place[1] == 0]
    assert len(deep) == 17
    assert len(places) == 20  # and before the classifier, and on two block outputs that only the next block reads
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


def test_dac_snapshots_nest_and_stay_below_their_budgets(simulate):
    """spec dac properties"""
    from hetfl.plugins.methods.dac import count_units as lengths
    from hetfl.plugins.methods.dac import measure_cost as price

    made = simulate(extract="dac", aggregate="cluster", levels="1,0.7,0.4", steps=1, set={"dac": {"epochs": 1}})
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
