"""Submodels by their sizes: whose they are, and how long."""

from __future__ import annotations

import threading

import torch

from hetfl.models.state import tensors
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


class Twice(torch.nn.Module):
    """A module under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 6), torch.nn.Linear(6, 6)
        self.again, self.head = self.b, torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.again(torch.relu(self.b(torch.relu(self.a(x)))))))


def test_a_state_that_was_computed_with_stays_its_owners():
    model, x = Twice(), torch.randn(2, 8)
    made, state = SubmodelBuilder(model, trace(model, x)), {n: t.clone() for n, t in tensors(model).items()}
    before = {n: t.clone() for n, t in state.items()}
    assert torch.equal(made.logits(state, x), model(x))
    made.load({n: torch.zeros_like(t) for n, t in state.items()})
    assert all(torch.equal(t, before[n]) for n, t in state.items())
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
