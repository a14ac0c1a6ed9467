"""Multi-Krum (Blanchard et al., NeurIPS 2017) on common coverage: two clients are compared where both hold the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hetfl import Field, Merged, Plugin, Server, Update, Updates, hookimpl, mean


class Krum(Plugin):
    """The mean over the covering clients without the `attackers` clients that are farthest from their nearest others.

    A client's score is its mean squared distance to the n - f - 2 nearest of n clients, f of them attackers; the n - f lowest are
    averaged. The distance of two clients is per entry that both cover. An entry that at most f clients cover keeps its old value:
    they might all be attackers, and nobody else could tell.
    """

    attackers: int = Field(2, ge=0, description="attackers among a round's clients (f); at most (n - 3) / 2 of n are left out")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        updates = Updates(updates, server.state)
        most = max(0, min(self.attackers, (len(updates) - 3) // 2))
        if round == 1 and most < self.attackers:
            server.alarms.append(f"krum: {len(updates)} replies resist {most} attackers, not {self.attackers}")
        names = [n for n, _ in server.builder.model.named_parameters() if n in server.state]
        near = choose_nearest(measure_distances(updates, names), most)
        chosen = updates.among(lambda u: u.client in {updates[k].client for k in near})
        merged = mean(chosen, [1.0] * len(chosen))
        enough = {n: updates.cover(n, [1.0] * len(updates)) > most for n in updates.averaged()}
        return Merged({n: torch.where(enough[n], t, server.state[n]) if n in enough else t for n, t in merged.items()})


def measure_distances(updates: Updates, names: Sequence[str]) -> Tensor:
    """Squared distances between clients (n, n) per entry of the tensors `names` that both cover; NaN where they share none."""
    total, common = (torch.zeros(len(updates), len(updates), dtype=torch.float64) for _ in range(2))
    for name in names:
        values, coverage = (t.reshape(len(updates), -1).double() for t in updates.column(name))
        holds = (coverage > 0).double()
        change = (values - updates.old[name].flatten()) * holds
        squares = change.square()
        total += squares @ holds.T + holds @ squares.T - 2 * change @ change.T
        common += holds @ holds.T
    shared: Tensor = torch.where(common > 0, common, float("nan"))
    return total.clamp(min=0) / shared


def choose_nearest(distances: Tensor, attackers: int) -> list[int]:
    """The n - f clients of the lowest Krum scores, of `distances` (n, n), in their order; of equal scores the first."""
    number = len(distances)
    others = distances.clone().fill_diagonal_(float("nan")).nan_to_num(nan=float("inf")).sort(1).values
    nearest = others[:, : max(1, number - attackers - 2)]
    known = nearest.isfinite()
    scores = torch.where(known, nearest, 0.0).sum(1) / known.sum(1).clamp(min=1)  # 0 for one that shares no entry with others
    return sorted(scores.sort(stable=True).indices[: number - attackers].tolist())
