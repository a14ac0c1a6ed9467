"""Hermes against its spec's oracles and properties."""

from __future__ import annotations

import pytest
import torch

from helpers.oracles import T, close, over, server_with, update
from helpers.oracles import merged as merged_by
from hetfl.aggregation.updates import Update, Updates
from hetfl.plugins.methods import hermes, pruning
from hetfl.rounds.loop import run_round
from hetfl.submodel.plan import Patch, Selection, grow


def test_hermes_figure_5():
    """spec hermes O1"""
    i = T([[1.6, -0.4, 1.2], [2.5, 0.8, 0.4], [3.2, 0.1, 0.6]])
    j = T([[2.4, 1.4, 1.8], [0.5, 0.8, -1.6], [-0.8, 0.3, 0.4]])
    only = T([[7.0, 8, 9]] * 3)
    one = Update(1, {"v": Patch(torch.stack([i, only]), {0: T([0, 2])})}, 1.0)
    two = Update(2, {"v": Patch(j[None], {0: T([0])})}, 1.0)
    server = server_with(c1=1.0, c2=1.0)
    merged = merged_by(hermes.HermesMean(), Updates([one, two], {"v": torch.zeros(3, 3, 3)}), server)
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


@pytest.mark.parametrize(
    ("target", "clamp", "shares"),
    [
        (0.3, True, [0.8, 0.64, 0.512, 0.4096, 0.32768, 0.3]),
        (0.3, False, [0.8, 0.64, 0.512, 0.4096, 0.32768, 0.262144]),
        (0.6, True, [0.8, 0.64, 0.6]),
        (0.8, False, [0.8]),
        (None, False, [0.8, 0.64]),
    ],
)
def test_hermes_schedule(simulate, monkeypatch, target, clamp, shares):
    """spec hermes O4, round by round: a client that has reached its target does not say again what it keeps"""
    said = []

    def choose(task, ratio):
        said.append((task.round, ratio**2))
        return choose_strongest(task, ratio)

    choose_strongest = hermes.choose_strongest
    monkeypatch.setattr(hermes, "choose_strongest", choose)
    monkeypatch.setattr(pruning, "hold_out_and_score", lambda task: 1.0)
    options = {"extract": {"hermes": {"target": target, "clamp": clamp}}}
    simulate(len(shares) + 3, extract="hermes", aggregate="hermes", set=options, clients=1, levels="0.8")
    assert [round for round, _ in said] == list(range(1, len(shares) + 1))
    assert [share for _, share in said] == pytest.approx(shares)


def test_hermes_disjoint_and_identical_masks():
    """spec hermes O5"""
    server = server_with(c1=1.0, c2=1.0)
    apart = [update(1, [1.0, 0], mask=[1, 0]), update(2, [0.0, 5], mask=[0, 1])]
    merged = merged_by(hermes.HermesMean(), over([9.0, 9], *apart), server)
    assert [grow(merged.branches[f"client {c}"], {"v": T([0.0, 0])})[0]["v"][c - 1].item() for c in (1, 2)] == [1, 5]
    same = merged_by(hermes.HermesMean(weighting="samples"), over([9.0], update(1, [1.0], 10.0), update(2, [3.0], 30.0)), server)
    assert same.state["v"].tolist() == [2.5]
    assert all(branch["v"].values.tolist() == [2.5] for branch in same.branches.values())
    three = [update(1, [1.0]), update(2, [3.0]), update(3, [0.0], mask=[0])]
    every_one = merged_by(hermes.HermesMean(overlap="all"), over([9.0], *three), server)
    assert every_one.branches["client 1"]["v"].values.tolist() == [1]


def test_hermes_drops_whole_channels_and_ends_on_its_budget(simulate):
    """spec hermes properties: nesting, whole groups, ends clamped on the target"""
    made = simulate(extract="hermes", aggregate="hermes", rounds=8, steps=0, set={"extract": {"hermes": {"threshold": 0.0}}})
    kept = {}
    for round in range(1, 9):
        last = run_round(made.state, round, made.engine)
        for client, sent in last.assignments.items():
            plan = sent.plan
            assert isinstance(plan, Selection)
            for name, units in plan.kept.items():
                assert set(units.tolist()) <= set(kept.get((client, name), units).tolist())
                kept[client, name] = units
    assert last.assignments[0].plan.sizes == {"1": 8, "3": 6}
    assert last.assignments[1].plan.sizes == {"1": 4, "3": 3}
    assert set(made.server.branches) == {"client 0", "client 1", "client 2"}
    down = [row["bytes down"] for row in made.state.client_rows if row["client"] == 1]
    assert down[-1] < down[0]


def test_hermes_lasso_is_over_convolutions_and_linear_layers():
    """spec hermes 2: norm layers and biases have none"""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    assert close(hermes.group_lasso(net).detach(), (hermes.lasso(net[0].weight) + hermes.lasso(net[3].weight)).detach())


def test_hermes_keeps_the_branch_of_who_sits_out():
    """The page: non-participants keep their branch"""
    server = server_with(c1=1.0, c2=1.0)
    server.branches = {"client 2": {"v": Patch(T([7.0]))}}
    made = merged_by(hermes.HermesMean(), over([9.0], update(1, [1.0])), server)
    assert {name: branch["v"].values.item() for name, branch in made.branches.items()} == {"client 1": 1.0, "client 2": 7.0}


def test_hermes_does_not_prune_at_the_threshold_itself(simulate, monkeypatch):
    """spec hermes 1: where the accuracy exceeds the threshold"""
    monkeypatch.setattr(pruning, "hold_out_and_score", lambda task: 0.4)
    for threshold, whole in ((0.4, True), (0.39, False)):
        made = simulate(
            1,
            extract="hermes",
            aggregate="hermes",
            levels="0.5",
            set={"extract": {"hermes": {"threshold": threshold, "rate": 0.5}}},
        )
        kept = made.plugins.plugins["extract.hermes"]._kept[0]
        assert ([len(units) for units in kept.values()] == [8, 6]) == whole
