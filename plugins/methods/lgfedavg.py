"""LG-FedAvg (Liang et al., 2020): the last layers are shared, the others never leave the client (spec baselines 1, 2)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from torch import nn

from hetfl import Client, Exchange, Field, Plan, Plugin, Server, hookimpl, prefix


class LGFedAvg(Plugin):
    """A client gets its whole submodel once; from then on only the last `layers` layers travel, both ways.

    As in the paper's text, lower layers are local and upper ones global; the official code does the opposite for its CNN.
    """

    plans_by_width: ClassVar[bool] = True

    layers: int = Field(2, ge=0, description="how many of the last layers with weights are shared (global)")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(prefix(client.profile.width)) for client in clients]

    @hookimpl
    def exchange(self, server: Server, client: Client, names: Collection[str]) -> Exchange:
        shared = list_last_tensors(server.builder.model, self.layers)
        return Exchange(down=shared if client.last_round else None, up=shared)


def list_last_tensors(model: nn.Module, layers: int) -> list[str]:
    """The tensors of the last `layers` layers with a weight matrix, and of what lies between and after them."""
    names = list(model.state_dict())
    heavy = [name for name, p in model.named_parameters() if p.ndim > 1]
    return names[names.index(heavy[-min(layers, len(heavy))]) :] if layers else []
