"""FedAvg's mean for submodels: sum n (c x + (1 - c) old) / sum n (McMahan et al., AISTATS 2017; spec baselines 1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from hetfl import Merged, Plugin, Server, Update, hookimpl, running_mean


class FedAvg(Plugin):
    """Mean over all clients by their examples n; a client that lacks an entry (coverage c = 0) votes for the old value."""

    mean: ClassVar[Literal["covering", "all"] | None] = "all"

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        return Merged(running_mean(server.state, updates, absent=True))
