"""Batch norm measured and replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.runs import NORMED, run
from hetfl.models.normalization import measure_statistics


def test_static_batch_norm_statistics():
    """spec heterofl 6.7: batches [0, 2] then [4, 8]: mean 3.5, var 5.0"""
    model = nn.Sequential(nn.BatchNorm1d(1))
    batches = [(torch.tensor([[0.0], [2.0]]), torch.zeros(2)), (torch.tensor([[4.0], [8.0]]), torch.zeros(2))]
    state, count = measure_statistics(model, batches)
    assert count == 2
    assert state["0.running_mean"].item() == 3.5
    assert state["0.running_var"].item() == 5.0
    assert model[0].momentum == 0.1


@pytest.mark.parametrize("policy", ["none", "instance", "layer", "group"])
def test_replacements_of_batch_norm(tmp_path, policy):
    """spec heterofl 2.4: none, IN (as many groups as channels), LN (1 group), GN (4 groups)"""
    weights, _ = run(tmp_path / "a", norm_policy=policy, **NORMED)
    assert not any("running" in name for name in weights)
    assert ("1.weight" in weights) == (policy != "none")
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())
