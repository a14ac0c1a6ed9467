"""FedRolex (Alam et al., NeurIPS 2022): a window of channels that rolls on every round (spec fedrolex 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from hetfl import Client, Field, Plan, Plugin, Server, hookimpl, window


class FedRolex(Plugin):
    """Every client gets the window of its width; all windows of a round start at the same channel."""

    plans_by_width: ClassVar[bool] = True

    step: int = Field(1, ge=1, description="channels that the window moves each round")
    direction: Literal["forward", "backward"] = Field("forward", description="as in the paper's figure, or as in its code")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        start = (round - 1) * (self.step if self.direction == "forward" else -self.step)
        return [self._plan(server, client.profile.width, start) for client in clients]

    def _plan(self, server: Server, width: float, start: int) -> Plan:
        return server.select({group.name: window(group, width, start) for group in server.widths.groups})
