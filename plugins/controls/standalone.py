"""Every client for itself: its own model on its own data, nothing communicated (spec baselines 1, oracle O4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from hetfl import Client, Exchange, Field, Plan, Plugin, Server, hookimpl, prefix


class Standalone(Plugin):
    """A model of the client's own width that stays with it for the whole run; the global model never changes."""

    trains_global: ClassVar[bool] = False

    start: Literal["untrained", "server"] = Field(
        "untrained", description="what a client begins with: an untrained model, or once the server's pre-trained part"
    )

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(prefix(client.profile.width)) for client in clients]

    @hookimpl
    def exchange(self, client: Client) -> Exchange:
        first = self.start == "server" and not client.last_round
        return Exchange(down=None if first else (), up=())
