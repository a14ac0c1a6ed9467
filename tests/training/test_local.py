"""Local training."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.oracles import T, close
from hetfl.aggregation.mean import mean_with_absent
from hetfl.aggregation.updates import Update, Updates
from hetfl.config import resolve
from hetfl.data.dataset import Examples
from hetfl.models.state import tensors
from hetfl.rng import stream
from hetfl.submodel.plan import Patch
from hetfl.training.local import batch_rows, descend, learning_rate


def test_fedavg_of_one_client_is_a_central_step():
    """spec baselines O6"""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), T([0, 1, 0, 1])
    central = copy.deepcopy(model)
    F.cross_entropy(central(x), y).backward()
    with torch.no_grad():
        for p in central.parameters():
            p -= 0.1 * p.grad
    task = SimpleNamespace(
        model=model, masks={}, draws=False, stream=lambda purpose: torch.Generator(), options=resolve({"clip": 0})
    )
    descend(task, torch.optim.SGD(model.parameters(), 0.1), [(x, y)], lambda a, b: F.cross_entropy(model(a), b))
    merged = mean_with_absent(Updates([Update(1, {n: Patch(t) for n, t in tensors(model).items()}, 4.0)], tensors(model)), [4.0])
    assert all(close(merged[n], t.detach()) for n, t in central.named_parameters())


@pytest.mark.parametrize(("steps", "sizes"), [(0, [4, 4, 2] * 2), (2, [4, 4]), (5, [4, 4, 2, 4, 4]), (9, [4, 4, 2] * 3)])
def test_local_steps_break_passes_off_or_begin_new_ones(steps, sizes):
    data = Examples(torch.zeros(20, 1), torch.zeros(20), torch.arange(10, 20))
    options = resolve({"epochs": 2, "batch_size": 4, "local_steps": steps})
    rows = batch_rows(data, options, stream(0, "batches"), nn.Identity())
    assert [len(r) for r in rows] == sizes
    assert options.count_work(10) == (sum(sizes), len(sizes))
    for start in range(0, len(rows) - 2, 3):
        assert sorted(torch.cat(rows[start : start + 3]).tolist()) == list(range(10, 20))
    assert torch.equal(
        torch.cat(rows[:2]), torch.cat(batch_rows(data, resolve({"batch_size": 4}), stream(0, "batches"), nn.Identity())[:2])
    )


@pytest.mark.parametrize(("examples", "batch"), [(0, 4), (3, 1)])
def test_local_steps_end_where_there_is_nothing_to_train_on(examples, batch):
    """No examples, or none but single ones beside a batch norm."""
    data = Examples(torch.zeros(3, 1), torch.zeros(3), torch.arange(examples))
    assert batch_rows(data, resolve({"local_steps": 5, "batch_size": batch}), stream(0, "batches"), nn.BatchNorm1d(1)) == []


def test_learning_rates_of_rounds():
    options = resolve({"lr": 0.1, "lr_round_decay": 0.5, "lr_milestones": [2], "lr_decay": 0.1})
    assert [learning_rate(options, r) for r in (1, 2, 3, 4)] == pytest.approx([0.1, 0.05, 0.0025, 0.00125])
    assert learning_rate(resolve({"lr": 0.1}), 9) == 0.1
