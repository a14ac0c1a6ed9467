"""An aggregation: what becomes of the clients' updates."""

from __future__ import annotations

from collections.abc import Iterable

from hetfl import Field, Merged, Plugin, Server, Update, hookimpl, running_mean


class Template(Plugin):
    """The mean over the clients that cover an entry, each with a power of its examples as its weight."""

    power: float = Field(0.5, ge=0, description="0: every client counts 1, 1: as many as it has examples")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        return Merged(running_mean(server.state, updates, self.weigh))

    def weigh(self, update: Update) -> float:
        """What a client counts."""
        return float(update.weight**self.power)
