"""The geometric median of the clients' models by Weiszfeld steps (Pillutla et al., IEEE TSP 2022), where each client is measured
on the entries that it covers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from hetfl import Field, Merged, Plugin, Server, State, Update, Updates, hookimpl, mean
from hetfl.aggregation.mean import WeightedSum


class GeoMedian(Plugin):
    """A mean in which a client counts the inverse of its distance to the result, so that who is far away hardly counts.

    The distance is the root mean square over the entries that the client covers. An entry has at least the weight of `least` mean
    clients: what the covering ones lack is a vote for its old value, and where that is the most of it, the entry stays.
    """

    steps: int = Field(5, ge=1, description="Weiszfeld steps a round")
    floor: float = Field(1e-6, gt=0, description="smallest distance that counts (nu)")
    least: int = Field(5, ge=0, description="mean clients that an entry weighs at least: what is missing is for its old value")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        updates = Updates(updates, server.state)
        if not len(updates):
            return Merged(server.state)
        names = [n for n, _ in server.builder.model.named_parameters() if n in server.state]
        weights = [1.0] * len(updates)
        for _ in range(self.steps):
            middle = pull_mean(updates, names, weights, self.least)
            weights = [1 / max(self.floor, measure_distance(u, middle)) for u in updates]
        return Merged({**mean(updates, weights), **pull_mean(updates, updates.averaged(), weights, self.least)})


def pull_mean(updates: Updates, names: Iterable[str], weights: list[float], least: int) -> State:
    """old + sum w c (x - old) / max(sum w c, least x the mean weight) for each of the tensors `names`; old where sum w c is no
    more than half of that."""
    smallest = least * sum(weights) / len(weights)
    found = {}
    for name in names:
        old, total = updates.old[name], WeightedSum(updates.old[name])
        for update, weight in zip(updates, weights, strict=True):
            if name in update.patches:
                total.add(update.patches[name], weight)
        share = (total.count / smallest).clamp(max=1.0) if smallest else torch.ones(())
        found[name] = torch.where(share > 0.5, old + share * (total.mean() - old), old)
    return found


def measure_distance(update: Update, middle: State) -> float:
    """The root mean square of an update's entries from those of `middle` at the same places."""
    squares, number = 0.0, 0
    for name, patch in update.patches.items():
        if name in middle:
            values, coverage = patch.full(middle[name])
            squares += float((values - middle[name]).double().square().sum())
            number += int((coverage > 0).sum())
    return math.sqrt(squares / max(1, number))
