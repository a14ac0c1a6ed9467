"""HeteroFL's and FedRolex's mean over exactly those clients that hold an entry (spec heterofl 2.5, fedrolex 2.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from hetfl import Field, Merged, Plugin, Server, Update, hookimpl, running_mean
from hetfl.aggregation.updates import WEIGHTINGS


class Overlap(Plugin):
    """Per entry, the mean over the clients that cover it; what nobody covers keeps its old value."""

    mean: ClassVar[Literal["covering", "all"] | None] = "covering"
    weighting: Literal["uniform", "samples"] = Field("uniform", description="one vote a client, or one an example")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        return Merged(running_mean(server.state, updates, WEIGHTINGS[self.weighting]))
