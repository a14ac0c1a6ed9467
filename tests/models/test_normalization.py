"""Batch norm measured and replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.runs import NORMED, run
from hetfl.models.normalization import measure_statistics


def test_static_batch_norm_statistics():
    """spec heterofl 6.7 has mean 3.5, var 5.0 of the batches [0, 2], [4, 8]: the mean of their variances. Ours is that of the four
    values together, by the law of total variance, whatever the batches."""
    model = nn.Sequential(nn.BatchNorm1d(1))
    batches = [(torch.tensor([[0.0], [2.0]]), torch.zeros(2)), (torch.tensor([[4.0], [8.0]]), torch.zeros(2))]
    state, examples = measure_statistics(model, batches)
    assert examples == 4
    assert state.keys() == {"0.running_mean", "0.running_var"}
    assert state["0.running_mean"].item() == model[0].running_mean.item() == 3.5
    assert state["0.running_var"].item() == model[0].running_var.item() == 8.75
    assert model[0].momentum == 0.1


def test_unequal_batches_count_by_their_examples():
    model, x = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    state, examples = measure_statistics(model, [(part, torch.zeros(len(part))) for part in (x[:2], x[2:6], x[6:])])
    values = x[:6].transpose(0, 1).flatten(1)  # one example has no variance of its own
    assert examples == 6
    assert torch.allclose(state["0.running_mean"], values.mean(1))
    assert torch.allclose(state["0.running_var"], values.var(1, correction=0))


def test_statistics_before_the_pass_do_not_matter():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    expected, _ = measure_statistics(model, [(x, torch.zeros(8))])
    model[0].running_mean.fill_(torch.inf)
    model[0].running_var.fill_(torch.nan)
    found, _ = measure_statistics(model, [(x, torch.zeros(8))])
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("policy", ["none", "instance", "layer", "group"])
def test_replacements_of_batch_norm(tmp_path, policy):
    """spec heterofl 2.4: none, IN (as many groups as channels), LN (1 group), GN (4 groups)"""
    weights, _ = run(tmp_path / "a", norm_policy=policy, **NORMED)
    assert not any("running" in name for name in weights)
    assert ("1.weight" in weights) == (policy != "none")
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())
