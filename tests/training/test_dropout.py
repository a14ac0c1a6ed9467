"""Random modes draw from the client's own stream."""

from __future__ import annotations

import torch
from torch import nn

from helpers.runs import run
from helpers.states import same
from hetfl.models import zoo


def test_dropout_draws_from_the_clients_own_stream(tmp_path, monkeypatch):
    def net(classes, channels, size):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, classes))

    monkeypatch.setitem(zoo.ZOO, "dropnet", net)
    values = {"extract": "heterofl", "aggregate": "overlap", "model": "dropnet"}
    one, _ = run(tmp_path / "1", workers=1, **values)
    torch.manual_seed(123)
    two, _ = run(tmp_path / "2", workers=2, **values)
    assert same(one, two)
