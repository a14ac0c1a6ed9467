"""Means in global coordinates: the oracles of the specs, any order, one by one or together."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import quick
from hetfl.aggregation.mean import MeanAggregator, mean, mean_with_absent
from hetfl.aggregation.updates import Update, Updates
from hetfl.hooks.loading import load_class
from hetfl.hooks.manager import PluginManager
from hetfl.submodel.plan import Patch
from hetfl.submodel.widths import Group, window


def covering(client, values, index=None, weight=1.0, coverage=None):
    where = {} if index is None else {0: torch.tensor(index)}
    return Update(client, {"v": Patch(torch.tensor(values, dtype=torch.float32), where, coverage)}, weight)


def mean_of(old, *updates, weights=None, merge=mean):
    ups = Updates(updates, {"v": torch.tensor(old, dtype=torch.float32)})
    return merge(ups, weights or [1.0] * len(ups))["v"].tolist()


def test_overlap_oracles():
    """spec heterofl 6.3, 6.4; fedrolex 6.3; baselines O1"""
    a, b, c = covering(0, [4, 4, 4, 4]), covering(1, [2, 2], [0, 1]), covering(2, [0], [0])
    assert mean_of([9, 9, 9, 9], a, b, c) == [2, 3, 4, 4]
    assert mean_of([9, 9, 9, 9], b, c) == [1, 2, 9, 9]
    one = Patch(torch.ones(3)).rows(torch.tensor([True, True, False]))
    two = Patch(torch.full((3,), 3.0)).rows(torch.tensor([False, True, False]))
    assert mean_of([7, 7, 7], Update(0, {"v": one}, 1), Update(1, {"v": two}, 1)) == [1, 2, 7]
    rolled = covering(0, [2, 3, 4, 1], [1, 2, 3, 0])
    assert mean_of([10] * 4, rolled, covering(1, [5, 7], [1, 2])) == [1, 3.5, 5, 4]
    assert mean_of([10] * 4, covering(1, [5, 7], [1, 2])) == [10, 5, 7, 10]
    pair = covering(0, [1, 2], weight=10), covering(1, [3, 6], weight=30)
    assert mean_of([0, 0], *pair, weights=[10, 30]) == [2.5, 5]
    assert mean_of([0, 0], *pair) == [2, 4]


def test_fedavg_lets_absentees_vote_for_the_old_value():
    a, b = covering(0, [4, 4]), covering(1, [2], [0])
    assert mean_of([8, 8], a, b, weights=[1, 3], merge=mean_with_absent) == [2.5, 7]


@quick
@given(st.lists(st.tuples(st.floats(0.1, 1), st.integers(1, 50), st.integers(0, 9)), min_size=1, max_size=5))
def test_means_do_not_depend_on_client_order_and_stay_inside(clients):
    old = {"v": torch.full((12,), 0.5)}
    ups = []
    for i, (ratio, n, start) in enumerate(clients):
        where = window(Group("", 12), ratio, start)
        ups.append(Update(i, {"v": Patch(torch.rand(len(where), generator=torch.Generator().manual_seed(i)), {0: where})}, n))
    for merge in (mean, mean_with_absent):
        forward, backward = Updates(ups, old), Updates(ups[::-1], old)
        a = merge(forward, forward.weights)["v"]
        assert torch.equal(a, merge(backward, backward.weights)["v"])
        assert ((a > -1e-6) & (a < 1 + 1e-6)).all()
    covered = torch.cat([u.patches["v"].index[0] for u in ups]).unique()
    outside = [i for i in range(12) if i not in covered.tolist()]
    assert torch.equal(mean(Updates(ups, old), [1.0] * len(ups))["v"][outside], old["v"][outside])


def test_integer_buffers_are_not_averaged():
    old = {"seen": torch.tensor(3)}
    ups = Updates([Update(i, {"seen": Patch(torch.tensor(n))}, 1.0) for i, n in enumerate((5, 8))], old)
    assert mean(ups, [1.0, 1.0])["seen"].item() == 8


STREAMING = [("overlap", {}), ("overlap", {"weighting": "samples"}), ("fedavg", {}), ("fiarse", {"rate": 0.5})]


@pytest.mark.parametrize(("name", "options"), STREAMING)
def test_taking_updates_one_by_one_is_taking_them_together(name, options):
    from hetfl import registry

    plugins = PluginManager({f"aggregate.{name}": load_class(registry.find("aggregate", name))(**options)})
    old = {"w": torch.randn(6, 4), "seen": torch.tensor(2)}
    rows = [torch.tensor([0, 1, 2]), torch.tensor([5, 1]), torch.arange(6)]
    updates = [
        Update(i, {"w": Patch(torch.randn(len(at), 4), {0: at}), "seen": Patch(torch.tensor(3 + i))}, 10.0 + i)
        for i, at in enumerate(rows)
    ]
    server = SimpleNamespace(state=old, clients={})
    one_by_one = plugins.aggregate(server, iter(updates), 1).state
    together = Updates(updates[::-1], old)
    weights = together.votes("samples" if name == "fedavg" or "weighting" in options else "uniform")
    whole = (mean_with_absent if name == "fedavg" else mean)(together, weights)["w"]
    whole = old["w"] + options.get("rate", 1) * (whole - old["w"]) if "rate" in options else whole
    assert torch.equal(one_by_one["w"], whole)
    assert one_by_one["seen"] == 5
    assert not torch.equal(one_by_one["w"], old["w"])


def test_a_running_aggregation_holds_no_reply(simulate, monkeypatch):
    """While a client's update is added, those before it are gone."""
    alive, seen, whole = [], weakref.WeakSet(), MeanAggregator.add

    def add(self, update, weight):
        seen.add(update)
        alive.append(len(seen))
        whole(self, update, weight)

    monkeypatch.setattr(MeanAggregator, "add", add)
    simulate(extract="heterofl", aggregate="overlap", clients=12, levels="1", steps=1, pretrain_steps=0)
    assert len(alive) == 12
    assert max(alive) <= 2


def test_a_tensor_that_nobody_sent_keeps_its_value():
    from hetfl.aggregation.updates import Update, Updates
    from hetfl.submodel.plan import Patch

    old = {"a": torch.zeros(2), "b": torch.ones(2), "n": torch.tensor(3)}
    updates = Updates([Update(0, {"a": Patch(torch.tensor([4.0, 4]))}, 1.0), Update(1, {}, 1.0)], old)
    new = mean(updates, [1.0, 1.0])
    assert new["a"].tolist() == [4, 4]
    assert torch.equal(new["b"], old["b"])
    assert new["n"] == 3
    assert updates.column("b")[1].sum() == 0
