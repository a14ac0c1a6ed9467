"""Two plugins for hetfl: an extraction that spreads the kept channels evenly, and an aggregation by midpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hetfl import Client, Field, Merged, Plan, Plugin, Server, Update, Updates, hookimpl, mean, unit_count


class Alternate(Plugin):
    """Keeps evenly spaced channels of every layer; at width 0.5, every second one."""

    shift: int = Field(0, ge=0, description="channels that the pattern moves each round")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        return [server.select(lambda size, c=c: spaced(size, c.profile.width, self.shift * round)) for c in clients]


def spaced(size: int, width: float, shift: int) -> Tensor:
    """The kept channels of a layer of `size` channels, in ascending order."""
    kept = unit_count(size, width)
    return ((torch.arange(kept) * size // kept + shift) % size).sort().values


class Midpoint(Plugin):
    """Per entry, half way between the extremes of the clients that cover it; what nobody covers keeps its old value."""

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        updates = Updates(updates, server.state)
        state = mean(updates, updates.weights)
        for name in updates.averaged():
            values, coverage = updates.column(name)
            held, endless = coverage > 0, float("inf")
            middle = (values.masked_fill(~held, -endless).amax(0) + values.masked_fill(~held, endless).amin(0)) / 2
            state[name] = torch.where(held.any(0), middle, updates.old[name])
        return Merged(state)
