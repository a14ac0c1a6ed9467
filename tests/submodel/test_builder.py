"""Submodels by their sizes: whose they are, and how long."""

from __future__ import annotations

import threading

import torch

from hetfl.models.zoo import ZOO
from hetfl.submodel import builder
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.tracing.groups import trace


def test_a_thread_keeps_the_submodels_it_used_last_and_shares_none(monkeypatch):
    monkeypatch.setattr(builder, "CACHED", 2)
    model = ZOO["mlp"](classes=3, channels=1, size=4, hidden=[4])
    made = SubmodelBuilder(model, trace(model, torch.randn(2, 1, 4, 4), verify=False))
    (group,) = made.full

    def get(width):
        return made.module({group: width})

    first, second = get(1), get(2)
    assert get(1) is first
    get(3)  # of two that stay, that of 2 units is the least recently used
    assert get(1) is first
    assert get(2) is not second
    found = []
    thread = threading.Thread(target=lambda: found.append(get(1)))
    thread.start()
    thread.join()
    assert found[0] is not first
    assert found[0] is not get(1)
