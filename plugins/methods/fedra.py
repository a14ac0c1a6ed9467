"""FedRA (Su et al., ECCV 2024): each client trains a random subset of the layers, drawn anew every round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from hetfl import Client, Field, Plan, Plugin, Server, hookimpl
from hetfl.plugins.methods.depth import BY, By, count_layers, list_blocks


class FedRA(Plugin):
    """Random residual blocks for each client and round; everything else of the model is kept. With adapters (--adapter), as in the
    paper, only those of the drawn blocks are trained and sent."""

    expected_failures: ClassVar[dict[str, str]] = {
        "respects_the_budget": "who can afford no block gets one, with all that is in none"
    }

    by: By = Field("parameters", description=BY)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        return [self._plan(server, client, round) for client in clients]

    def _plan(self, server: Server, client: Client, round: int) -> Plan:
        blocks = list_blocks(server)
        order = torch.randperm(len(blocks), generator=server.stream("fedra", round, client.id)).tolist()

        def draw(number: int) -> Plan:
            return server.select(blocks=[blocks[i] for i in order[:number]])

        return draw(count_layers(server, client, len(blocks), draw, self.by))
