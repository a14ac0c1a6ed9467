"""An extraction: which units of every layer a client is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetfl import Client, Field, Plan, Plugin, Server, hookimpl, unit_count


class Template(Plugin):
    """Units at even distances, the first of which moves on every round."""

    step: int = Field(1, ge=0, description="units that the pattern moves on a round")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        return [self._plan(server, client.profile.width, round) for client in clients]

    def _plan(self, server: Server, width: float, round: int) -> Plan:
        return server.select(lambda size: choose_units(size, width, self.step * round))


def choose_units(size: int, width: float, start: int) -> Tensor:
    """ceil(width * size) different units of a layer of `size`, in ascending order."""
    kept = unit_count(size, width)
    return ((torch.arange(kept) * size // kept + start) % size).sort().values
