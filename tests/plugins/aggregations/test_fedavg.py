"""FedAvg's means."""

from __future__ import annotations

from helpers.oracles import over, update
from hetfl.aggregation.mean import mean_with_absent


def test_fedavg_means():
    """spec baselines O1"""
    updates = over([0.0, 0], update(1, [1.0, 2], 10.0), update(2, [3.0, 6], 30.0))
    assert mean_with_absent(updates, updates.weights)["v"].tolist() == [2.5, 5]
    assert mean_with_absent(updates, [1.0, 1.0])["v"].tolist() == [2, 4]
