"""Everyone trains the whole model: FedAvg's extraction (McMahan et al., AISTATS 2017; spec baselines 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hetfl import Client, Plan, Plugin, Server, hookimpl, prefix


class Full(Plugin):
    """The whole model for every client, whatever its profile says."""

    plans_by_width: ClassVar[bool] = True
    expected_failures: ClassVar[dict[str, str]] = {"respects_the_budget": "it is what others are measured by: nobody is spared"}

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(prefix(1)) for _ in clients]
