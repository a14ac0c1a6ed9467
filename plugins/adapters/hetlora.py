"""HetLoRA's aggregation (Cho et al., EMNLP 2024): adapters padded with zeros, clients weighted by the norm of what they learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch

from hetfl import Merged, NotApplicable, Plugin, Server, Update, Updates, hookimpl, mean
from hetfl.models.adapters import list_adapters, multiply


class HetLora(Plugin):
    """A client counts ||B A|| of all its adapters together; ranks that it lacks count as zeros."""

    expected_failures: ClassVar[dict[str, str]] = {
        "keeps_uncovered_entries": "a rank that a client lacks counts as zeros, so one that all lack becomes zeros (the paper pads)"
    }

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        updates, adapters = Updates(updates, server.state), list_adapters(list(server.state))
        if not adapters or any(name not in u.patches for u in updates for x in adapters for name in (x.a, x.b)):
            raise NotApplicable("not applicable: not every client sends both halves of every adapter (--adapter lora:rank=8)")
        norms = [
            float(torch.stack([multiply(u.patches[x.a].values, u.patches[x.b].values).norm() for x in adapters]).norm())
            for u in updates
        ]
        weights = norms if sum(norms) > 0 else updates.weights
        state = mean(updates, weights)
        for name in (name for x in adapters for name in (x.a, x.b)):
            state[name] = state[name] * (updates.cover(name, weights) / sum(weights))
        return Merged(state)
