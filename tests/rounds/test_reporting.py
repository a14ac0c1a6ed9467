"""Rows of clients.csv."""

from __future__ import annotations

import torch

from hetfl.profiling import cost
from hetfl.profiling.cost import Cost


def test_masks_save_no_compute(simulate):
    """A device that holds a masked model computes all of it (spec fiarse 5.6)."""
    made = simulate(extract="fiarse", aggregate="fiarse", steps=1)
    plan = made.last.assignments[1].plan
    assert plan.sizes == made.server.builder.full
    from hetfl.rounds.loop import device_costs

    real = Cost(*(cost.measure_cost(made.server.builder.build(), torch.randn(2, 1, 8, 8), torch.arange(2)).__dict__.values()))
    row = device_costs(real, made.last.assignments[1])
    assert row["MACs"] == real.macs
    assert row["memory"] == real.memory
    assert 0.2 < row["parameters"] / real.parameters < 0.3
