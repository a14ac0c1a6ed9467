"""Robust aggregation by coverage: median and trimmed mean (Yin et al., ICML 2018) over the clients that hold an entry.

The paper's clients all hold the whole model. Where few clients cover an entry there is no majority to decide: `least` lets the
missing ones vote for the entry's old value, so that with least = 2 f + 1 a median resists f attackers wherever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hetfl import Field, Merged, Plugin, Server, State, Update, Updates, hookimpl

CHUNK = 1 << 16  # entries that are sorted at a time


class TrimmedMean(Plugin):
    """Per entry, the mean of the covering clients without the `trim` share of largest and of smallest values."""

    trim: float = Field(0.1, ge=0, lt=0.5, description="share of the covering clients left out at either end")
    least: int = Field(1, ge=1, description="votes that an entry has at least: the missing ones are for its old value")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        updates = Updates(updates, server.state)
        if round == 1:
            warn_of_coverage(server, updates, "trimmed-mean", lambda votes: (self.trim * votes.clamp(min=self.least)).floor())
        return Merged(trim_all(updates, self.trim, self.least))


class Median(Plugin):
    """Per entry, the median of the covering clients (the mean of the middle two); what nobody covers keeps its old value."""

    least: int = Field(1, ge=1, description="votes that an entry has at least: the missing ones are for its old value")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        updates = Updates(updates, server.state)
        if round == 1:
            warn_of_coverage(server, updates, "median", lambda votes: ((votes.clamp(min=self.least) - 1) / 2).floor())
        return Merged(trim_all(updates, 0.5, self.least))


def warn_of_coverage(server: Server, updates: Updates, name: str, resists: Callable[[Tensor], Tensor]) -> None:
    """Says which share of the weights no attacker, or only one, can move as it likes; `resists`: attackers by covering clients."""
    votes = torch.cat([updates.cover(n, [1.0] * len(updates)).flatten() for n in updates.averaged()])
    number = resists(votes[votes > 0])
    if not len(number) or int(number.min()) >= 2:
        return
    none, one = (float((number == k).float().mean()) for k in (0, 1))
    server.alarms.append(
        f"{name}: so few clients cover {none:.0%} of the weights that one attacker among them can move these as it likes, and "
        f"{one:.0%} resist one but not two; {name}.least gives the missing votes to the old value (docs/robustness.md)"
    )


def trim_all(updates: Updates, trim: float, least: int = 1) -> State:
    """The trimmed mean of every tensor; integer buffers become the largest that is reported."""
    state = {name: trim_mean(*updates.column(name), updates.old[name], trim, least) for name in updates.averaged()}
    return {name: {**updates.counters(), **state}[name] for name in updates.old}


def trim_mean(values: Tensor, coverage: Tensor, old: Tensor, trim: float, least: int = 1) -> Tensor:
    """The mean over clients (dim 0) of the middle values: floor(trim * n) of the n votes for an entry are left out at either end,
    at least one stays. Where fewer than `least` clients cover an entry, the missing votes are for its old value.

    `values` and `coverage` are (clients, *shape), `old` (*shape) is what uncovered entries keep.
    Example: of the values 1, 2, 3, 9 with trim 0.25, the mean of 2 and 3.
    """
    columns = zip(
        *(t.reshape(n, -1).split(CHUNK, 1) for t, n in ((values, len(values)), (coverage, len(values)), (old, 1))), strict=True
    )
    return torch.cat([trim_columns(x, c, o[0], trim, least) for x, c, o in columns]).reshape(old.shape)


def trim_columns(values: Tensor, coverage: Tensor, old: Tensor, trim: float, least: int = 1) -> Tensor:
    """`trim_mean` of values and coverage (clients, entries), which are sorted as a whole."""
    number = (coverage > 0).sum(0)
    missing = torch.where(number > 0, least - number, 0).clamp(min=0)
    if (most := int(missing.max()) if len(missing) else 0) > 0:
        values = torch.cat([values, old.expand(most, -1)])
        coverage = torch.cat([coverage, (torch.arange(most).unsqueeze(1) < missing).to(coverage.dtype)])
        number = number + missing
    cut = torch.minimum((trim * number).floor(), ((number - 1) / 2).floor().clamp(min=0))
    ordered = values.masked_fill(coverage <= 0, float("inf")).sort(0).values
    rank = torch.arange(len(values)).unsqueeze(1)
    inner = (rank >= cut) & (rank < number - cut)
    total = torch.where(inner, ordered, 0.0).sum(0)
    return torch.where(number > 0, total / inner.sum(0).clamp(min=1), old)
