"""Means by level."""

from __future__ import annotations

import torch

from helpers.oracles import T, close, over, server_with, update
from hetfl.plugins.aggregations import cluster


def test_dac_clusters_are_isolated():
    """spec dac O5"""
    server = server_with(c1=0.5, c2=0.5, c3=1.0)
    server.state = {"v": T([0.0])}
    for weighting, value in (("samples", 2.5), ("uniform", 2.0)):
        plugin = cluster.Cluster(weighting=weighting)
        merged = plugin.aggregate(server, over([0.0], update(1, [1.0], 10.0), update(2, [3.0], 30.0), update(3, [7.0], 5.0)))
        assert close(merged.branches["level 0.5"]["v"].values, [value])
        assert close(merged.branches["level 1"]["v"].values, [7.0])
        other = plugin.aggregate(server, over([0.0], update(1, [9.0], 10.0), update(2, [3.0], 30.0), update(3, [7.0], 5.0)))
        assert torch.equal(other.branches["level 1"]["v"].values, merged.branches["level 1"]["v"].values)
    server.branches = merged.branches
    assert close(plugin.base_state(server, server.clients[1])["v"], [2.0])
    later = plugin.aggregate(server, over([0.0], update(1, [5.0], 10.0)))
    assert {name: branch["v"].values.item() for name, branch in later.branches.items()} == {"level 0.5": 5.0, "level 1": 7.0}
