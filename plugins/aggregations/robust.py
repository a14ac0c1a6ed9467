"""Robust aggregation by coverage: median and trimmed mean (Yin et al., ICML 2018) over the clients that hold an entry."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hetfl import Field, Merged, Plugin, Server, State, Update, Updates, hookimpl

CHUNK = 1 << 16  # entries that are sorted at a time


class TrimmedMean(Plugin):
    """Per entry, the mean of the covering clients without the `trim` share of largest and of smallest values."""

    trim: float = Field(0.1, ge=0, lt=0.5, description="share of the covering clients left out at either end")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        return Merged(trim_all(Updates(updates, server.state), self.trim))


class Median(Plugin):
    """Per entry, the median of the covering clients (the mean of the middle two); what nobody covers keeps its old value."""

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        return Merged(trim_all(Updates(updates, server.state), 0.5))


def trim_all(updates: Updates, trim: float) -> State:
    """The trimmed mean of every tensor; integer buffers become the largest that is reported."""
    state = {name: trim_mean(*updates.column(name), updates.old[name], trim) for name in updates.averaged()}
    return {name: {**updates.counters(), **state}[name] for name in updates.old}


def trim_mean(values: Tensor, coverage: Tensor, old: Tensor, trim: float) -> Tensor:
    """The mean over clients (dim 0) of the middle values: floor(trim * n) of the n that cover an entry are left out at either end,
    at least one stays.

    `values` and `coverage` are (clients, *shape), `old` (*shape) is what uncovered entries keep.
    Example: of the values 1, 2, 3, 9 with trim 0.25, the mean of 2 and 3.
    """
    columns = zip(
        *(t.reshape(n, -1).split(CHUNK, 1) for t, n in ((values, len(values)), (coverage, len(values)), (old, 1))), strict=True
    )
    return torch.cat([trim_columns(x, c, o[0], trim) for x, c, o in columns]).reshape(old.shape)


def trim_columns(values: Tensor, coverage: Tensor, old: Tensor, trim: float) -> Tensor:
    """`trim_mean` of values and coverage (clients, entries), which are sorted as a whole."""
    number = (coverage > 0).sum(0)
    cut = torch.minimum((trim * number).floor(), ((number - 1) / 2).floor().clamp(min=0))
    ordered = values.masked_fill(coverage <= 0, float("inf")).sort(0).values
    rank = torch.arange(len(values)).unsqueeze(1)
    inner = (rank >= cut) & (rank < number - cut)
    total = torch.where(inner, ordered, 0.0).sum(0)
    return torch.where(number > 0, total / inner.sum(0).clamp(min=1), old)
