"""Widths over the whole round: what all clients train together is bounded, and who has most to learn from gets the widest parts."""

from __future__ import annotations

from collections.abc import Sequence

from hetfl import Client, Field, Plugin, Server, hookimpl


class Ration(Plugin):
    """The round's clients train `budget` whole models each on average: a submodel of width r counts r^2, as its compute does.

    All begin with the least width that one of them affords. In the order of their need, unknown clients first, then by the sum of
    losses over their examples, each gets the largest width that it affords and that is left, of those in the round. The server
    knows so little else; AdaptiveFL and HASA learn from resources and results which client gets which submodel, which is not done
    here. Where not even the least widths fit into the budget, all have those.
    """

    budget: float = Field(0.25, gt=0, le=1, description="whole models that a client trains on average")

    @hookimpl
    def allot(self, server: Server, clients: Sequence[Client], widths: Sequence[float]) -> list[float]:
        grid, least = sorted(set(widths), reverse=True), min(widths, default=1.0)
        left, found = self.budget * len(widths) - len(widths) * least**2, [least] * len(widths)
        for place in sorted(range(len(widths)), key=lambda place: (-find_need(clients[place]), clients[place].id)):
            able = (width for width in grid if width <= widths[place] and width**2 - least**2 <= left + 1e-9)
            found[place] = next(able, least)
            left -= found[place] ** 2 - least**2
        return found


def find_need(client: Client) -> float:
    """How much there is to learn from a client: its examples times its last loss; most of one that is not known, nothing of one
    that was late, or failed, when it was last asked."""
    last = client.last
    if {"examples", "loss"} <= last.keys():
        return float(last["examples"] * last["loss"])
    return 0.0 if last else float("inf")
