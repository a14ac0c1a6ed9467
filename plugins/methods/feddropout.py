"""Federated Dropout (Caldas et al., 2018): random channels, drawn anew every round (field notes 3.2; spec fedrolex 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetfl import Client, Field, Plan, Plugin, Server, hookimpl, unit_count


class FedDropout(Plugin):
    """Each client's own random channels; the layers that residual sums tie are one group, with one draw for all of them."""

    shared: bool = Field(False, description="one draw for all clients of a round: the narrower ones get a part of it")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        return [self._plan(server, client, round) for client in clients]

    def _plan(self, server: Server, client: Client, round: int) -> Plan:
        generator = server.stream("dropout", round, -1 if self.shared else client.id)
        width = client.profile.width
        return server.select(lambda size: torch.randperm(size, generator=generator)[: unit_count(size, width)].sort().values)
