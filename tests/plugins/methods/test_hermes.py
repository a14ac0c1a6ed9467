"""Hermes against its spec's oracles and properties."""

from __future__ import annotations

import pytest
import torch

from helpers.oracles import T, close, over, schedule, server_with, update
from hetfl.aggregation.updates import Update, Updates
from hetfl.plugins.methods import hermes
from hetfl.submodel.plan import Patch, Selection, grow


def test_hermes_figure_5():
    """spec hermes O1"""
    i = T([[1.6, -0.4, 1.2], [2.5, 0.8, 0.4], [3.2, 0.1, 0.6]])
    j = T([[2.4, 1.4, 1.8], [0.5, 0.8, -1.6], [-0.8, 0.3, 0.4]])
    only = T([[7.0, 8, 9]] * 3)
    one = Update(1, {"v": Patch(torch.stack([i, only]), {0: T([0, 2])})}, 1.0)
    two = Update(2, {"v": Patch(j[None], {0: T([0])})}, 1.0)
    server = server_with(c1=1.0, c2=1.0)
    merged = hermes.HermesMean().aggregate(server, Updates([one, two], {"v": torch.zeros(3, 3, 3)}))
    both = T([[2, 0.5, 1.5], [1.5, 0.8, -0.6], [1.2, 0.2, 0.5]])
    first, second = (grow(merged.branches[f"client {c}"], {"v": torch.zeros(3, 3, 3)})[0]["v"] for c in (1, 2))
    assert close(first[0], both)
    assert close(second[0], both)
    assert close(first[2], only)
    assert not first[1].any()
    assert not second[1:].any()


def test_hermes_lasso():
    """spec hermes O2, O3"""
    assert close(hermes.lasso(T([[3.0, 4], [0, 0], [1, 0]])), 13.162278, 1e-5)
    w = torch.zeros(2, 2, 1, 2)
    w[0, 0, 0], w[1, 1, 0] = T([3.0, 4]), T([5.0, 12])
    assert close(hermes.lasso(w), 36)
    w[0, 1, 0] = T([0.0, 12])
    assert close(hermes.lasso(w), 48.691806, 1e-5)
    zero = torch.zeros(3, 2, requires_grad=True)
    hermes.lasso(zero).backward()
    assert zero.grad.eq(0).all()


def test_hermes_schedule():
    """spec hermes O4"""
    assert list(schedule(0.2, 0.3, clamp=True)) == pytest.approx([0.8, 0.64, 0.512, 0.4096, 0.32768, 0.3])
    assert list(schedule(0.2, 0.3))[-1] == pytest.approx(0.262144)


def test_hermes_disjoint_and_identical_masks():
    """spec hermes O5"""
    server = server_with(c1=1.0, c2=1.0)
    apart = [update(1, [1.0, 0], mask=[1, 0]), update(2, [0.0, 5], mask=[0, 1])]
    merged = hermes.HermesMean().aggregate(server, over([9.0, 9], *apart))
    assert [grow(merged.branches[f"client {c}"], {"v": T([0.0, 0])})[0]["v"][c - 1].item() for c in (1, 2)] == [1, 5]
    same = hermes.HermesMean(weighting="samples").aggregate(server, over([9.0], update(1, [1.0], 10.0), update(2, [3.0], 30.0)))
    assert same.state["v"].tolist() == [2.5]
    assert all(branch["v"].values.tolist() == [2.5] for branch in same.branches.values())
    three = [update(1, [1.0]), update(2, [3.0]), update(3, [0.0], mask=[0])]
    every_one = hermes.HermesMean(overlap="all").aggregate(server, over([9.0], *three))
    assert every_one.branches["client 1"]["v"].values.tolist() == [1]


def test_hermes_drops_whole_channels_and_ends_on_its_budget(simulate):
    """spec hermes properties: nesting, whole groups, ends clamped on the target"""
    made = simulate(extract="hermes", aggregate="hermes", rounds=8, steps=0, set={"extract": {"hermes": {"threshold": 0.0}}})
    kept = {}
    for round in range(1, 9):
        made.rounds.step(round, made.grid)
        for client, sent in made.rounds._sent.items():
            plan = sent.plan
            assert isinstance(plan, Selection)
            for name, units in plan.kept.items():
                assert set(units.tolist()) <= set(kept.get((client, name), units).tolist())
                kept[client, name] = units
    assert made.rounds._sent[0].plan.sizes == {"1": 8, "3": 6}
    assert made.rounds._sent[1].plan.sizes == {"1": 4, "3": 3}
    assert set(made.server.branches) == {"client 0", "client 1", "client 2"}
    down = [row["bytes down"] for row in made.rounds.client_rows if row["client"] == 1]
    assert down[-1] < down[0]
