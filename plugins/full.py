"""Everyone trains the whole model: FedAvg's extraction (McMahan et al., AISTATS 2017; spec baselines 1)."""

from __future__ import annotations

from collections.abc import Sequence

from hetfl.core.plans import Plan, prefix
from hetfl.core.server import Server
from hetfl.core.strategy import Strategy, hookimpl
from hetfl.core.types import Client


class Full(Strategy):
    """The whole model for every client, whatever its profile says."""

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(prefix(1)) for _ in clients]
