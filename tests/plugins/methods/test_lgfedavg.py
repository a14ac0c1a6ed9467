"""LG-FedAvg against the oracles of the baselines' spec."""

from __future__ import annotations

import torch

from helpers.states import same, sent_and_got
from hetfl.models.convnets import MLP
from hetfl.plugins.methods import lgfedavg


def test_lg_counts():
    """spec baselines O3: hidden2, hidden3 and out of 784-512-256-256-128-10 are 99,978 of 633,226 parameters"""
    model = MLP(10, 1, 28, hidden=(512, 256, 256, 128))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 633_226
    assert sum(sizes[name] for name in lgfedavg.list_last_tensors(model, 3)) == 99_978


def test_local_layers_of_lg_never_move_and_are_never_sent_again(simulate, monkeypatch):
    """spec baselines O2, O3: all layers shared is uniform FedAvg, none is standalone from the server's start"""
    seen = sent_and_got(monkeypatch)
    made = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 1}})
    local = [n for n in made.server.state if not n.startswith("5.")]
    assert all(torch.equal(made.server.state[n], made.state.initial[n]) for n in local)
    assert not torch.equal(made.server.state["5.weight"], made.state.initial["5.weight"])
    mine = {(client, round): (before, after) for client, round, before, after, _ in seen}
    for client in range(3):
        assert all(torch.equal(mine[client, 2][0][n], mine[client, 1][1][n]) for n in local)
    assert torch.equal(mine[0, 2][0]["5.weight"], mine[2, 2][0]["5.weight"])
    once = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 1}}, steps=1)
    assert all(set(s.travels) == {"5.weight", "5.bias"} for s in once.last.assignments.values())  # as evaluated after round 1
    down = [row["bytes down"] for row in made.state.client_rows if row["client"] == 0]
    assert down[0] > 3 * down[1]
    assert down[1] == down[2]
    everything = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 9}})
    fedavg = simulate(extract="full", aggregate="overlap", levels="1")
    assert same(everything.server.state, fedavg.server.state)
    none = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 0}})
    assert same(none.server.state, none.state.initial)
