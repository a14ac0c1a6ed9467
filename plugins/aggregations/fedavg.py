"""FedAvg's mean for submodels: sum n (c x + (1 - c) old) / sum n (McMahan et al., AISTATS 2017; spec baselines 1)."""

from __future__ import annotations

from typing import ClassVar

from hetfl import Plugin, Server, hookimpl
from hetfl.aggregation.mean import Fold, MeanAggregator


class FedAvg(Plugin):
    """Mean over all clients by their examples n; a client that lacks an entry (coverage c = 0) votes for the old value."""

    mean: ClassVar[bool] = True

    @hookimpl
    def fold(self, server: Server) -> Fold:
        return MeanAggregator(server.state, absent=True)
