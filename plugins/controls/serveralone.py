"""The control without clients: the model trained on the server's data alone (spec baselines 1, oracle O5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hetfl import Client, Field, Plugin, Server, hookimpl


class ServerAlone(Plugin):
    """Every client sits out; each round the server trains on its own examples. No byte is sent."""

    epochs: int = Field(10, ge=1, description="epochs a round over the server's data (FedConv's number)")
    lr: float = Field(1e-4, gt=0, description="Adam learning rate (FedConv's)")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[None]:
        steps = self.epochs * math.ceil(len(server.public.tune) / server.options.server_batch_size)
        server.state = server.train(server.state, steps, "serveralone", round, lr=self.lr)
        return [None] * len(clients)
