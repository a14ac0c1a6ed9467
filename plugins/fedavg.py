"""FedAvg's mean for submodels: sum n (c x + (1 - c) old) / sum n (McMahan et al., AISTATS 2017; spec baselines 1)."""

from __future__ import annotations

from typing import ClassVar

from hetfl.core.merge import Fold, Mean
from hetfl.core.server import Server
from hetfl.core.strategy import Strategy, hookimpl


class FedAvg(Strategy):
    """Mean over all clients by their examples n; a client that lacks an entry (coverage c = 0) votes for the old value."""

    mean: ClassVar[bool] = True

    @hookimpl
    def fold(self, server: Server) -> Fold:
        return Mean(server.state, absent=True)
