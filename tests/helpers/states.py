"""States compared, and what every local training was given and made."""

from __future__ import annotations

import torch

from hetfl.models.state import tensors
from hetfl.training import local as train


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def sent_and_got(monkeypatch):
    """(client, model before, model after, masks) of every local training, innermost."""
    seen, whole = [], train.fit

    def fit(task):
        before = {n: t.clone() for n, t in tensors(task.model).items()}
        reply = whole(task)
        seen.append((task.client, task.round, before, {n: t.clone() for n, t in reply.state.items()}, dict(task.masks)))
        return reply

    monkeypatch.setattr(train, "fit", fit)
    return seen
