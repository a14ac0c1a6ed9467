"""What every mean promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import close, merged, over, quick, server_with, update
from hetfl.plugins.aggregations import cluster, robust
from hetfl.plugins.aggregations.fedavg import FedAvg
from hetfl.plugins.aggregations.overlap import Overlap
from hetfl.plugins.methods import fiarse, hermes, tailorfl

MEANS = {
    "overlap": Overlap(), "samples": Overlap(weighting="samples"), "fedavg": FedAvg(), "fiarse": fiarse.FIARSEMean(),
    "tailorfl": tailorfl.TailorFLMean(), "cluster": cluster.Cluster(), "hermes": hermes.HermesMean(), "median": robust.Median(),
    "trimmed-mean": robust.TrimmedMean(trim=0.2),
}  # fmt: skip


def call(plugin, updates):
    """The next state under an aggregation of clients 0 … 3."""
    return merged(plugin, updates, server_with(c0=1.0, c1=0.5, c2=0.25, c3=0.5)).state["v"]


@pytest.mark.parametrize("name", MEANS)
@quick
@given(st.integers(1, 4), st.integers(0, 99), st.permutations(range(4)))
def test_means_lie_between_what_they_are_of_and_know_no_order(name, clients, seed, order):
    """spec baselines, heterofl, lotteryfl, tailorfl: within [min, max], order of clients, old value where nobody covers"""
    g = torch.Generator().manual_seed(seed)
    values, masks, old = (
        torch.randn(clients, 5, generator=g),
        torch.rand(clients, 5, generator=g) > 0.4,
        torch.randn(5, generator=g),
    )
    ours = [update(c, v.tolist(), float(c + 1), m.tolist()) for c, (v, m) in enumerate(zip(values, masks, strict=True))]
    new = call(MEANS[name], over(old.tolist(), *ours))
    assert torch.equal(new, call(MEANS[name], over(old.tolist(), *[ours[i] for i in order if i < clients])))
    for k in range(5):
        held = torch.cat([values[masks[:, k], k], old[k : k + 1]]) if name == "fedavg" else values[masks[:, k], k]
        assert new[k] == old[k] if not masks[:, k].any() else held.min() - 1e-5 <= new[k] <= held.max() + 1e-5
    same = [update(c, values[0].tolist(), float(c + 1)) for c in range(clients)]
    assert close(call(MEANS[name], over(old.tolist(), *same)), values[0], 1e-5)
