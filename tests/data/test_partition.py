"""Who holds which rows: each partition's skew, and the seed it is drawn from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.datasets import rows, write
from hetfl.config import DataOptions
from hetfl.data.loading import load
from hetfl.data.partition import deal, spread


def test_every_beginning_of_a_spread_is_in_proportion():
    y = torch.tensor([0] * 80 + [1] * 19 + [2])
    order = spread(y, torch.Generator().manual_seed(3))
    assert sorted(order.tolist()) == list(range(100))
    assert sorted(y[order[:3]].tolist()) == [0, 1, 2]
    assert y[order[:50]].bincount().tolist() in ([39, 10, 1], [40, 9, 1])


def test_dirichlet_is_skewed_and_iid_is_not():
    skewed = load(DataOptions(alpha=0.1, clients=5)).counts.double()
    flat = load(DataOptions(partition="iid", clients=5)).counts.double()
    share = lambda counts: (counts.max(1).values / counts.sum(1)).mean()  # noqa: E731
    assert share(skewed) > 0.25 > 0.2 > share(flat)


def test_natural_clients_are_the_people(numbered):
    federation = load(DataOptions(dataset=str(numbered), partition="natural", clients=3))
    assert len(federation.clients) == 7
    numbers = [torch.cat([c.train.all()[0], c.test.all()[0]])[:, 0] for c in federation.clients]
    mean, std = torch.arange(300.0).mean(), torch.arange(300.0).std(correction=0)
    assert [set((n * std + mean).round().int().remainder(7).tolist()) for n in numbers] == [{i} for i in range(7)]


def test_label_can_be_the_owner(numbered):
    federation = load(DataOptions(dataset=str(numbered), partition="natural", id_column="label"))
    assert (federation.counts > 0).tolist() == torch.eye(4).bool().tolist()


def test_a_client_of_one_example_trains_on_it(tmp_path):
    folder = write(tmp_path / "d", rows(0, 8) | {"user": list("aaaaaaab")})
    write(folder, rows(100, 4), "test")
    federation = load(DataOptions(dataset=str(folder), partition="natural", server_data=0, own_test=0.9))
    assert [(len(c.train), len(c.test)) for c in federation.clients] == [(1, 6), (1, 0)]
    assert list(federation.clients[1].test.batches(4)) == []


@pytest.mark.parametrize("kind", ["dirichlet", "pathological", "shard"])
def test_partition_seed_draws_the_skew_anew(numbered, kind):
    options = DataOptions(dataset=str(numbered), partition=kind, clients=6, alpha=1, server_data=0, own_test=0)
    assert not torch.equal(load(options).counts, load(options.model_copy(update={"partition_seed": 1})).counts)


def test_deal_is_the_same_for_every_order_of_calls():
    y = torch.arange(200).remainder(5)
    options = DataOptions(alpha=1, clients=4)
    first = deal(options, y)
    torch.rand(7)
    second = deal(options, y)
    assert all(map(torch.equal, first.train + first.own, second.train + second.own))


@given(st.integers(2, 20), st.sampled_from([0.1, 0.5, 2.0]), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_quantity_skew_is_of_sizes(clients, alpha, seed):
    options = DataOptions(partition="quantity", clients=clients, alpha=alpha, partition_seed=seed)
    sizes = [len(c.train) + len(c.test) for c in load(options).clients]
    assert len(sizes) == clients
    assert min(sizes) >= 2
    assert sum(sizes) == 1365


def test_quantity_skew_grows_as_alpha_falls():
    spreads = [max(len(c.train) for c in load(DataOptions(partition="quantity", alpha=alpha)).clients) for alpha in (1e4, 1, 0.1)]
    assert spreads == sorted(spreads)
    assert spreads[0] < 140
