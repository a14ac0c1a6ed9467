"""Local training."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from helpers.oracles import T, close
from hetfl.aggregation.mean import mean_with_absent
from hetfl.aggregation.updates import Update, Updates
from hetfl.config import resolve
from hetfl.models.state import tensors
from hetfl.submodel.plan import Patch
from hetfl.training.local import descend


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
