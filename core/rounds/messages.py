"""What passes between the server's loop and a client."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hetfl.hooks.values import Client
from hetfl.models.state import State
from hetfl.submodel import encoding
from hetfl.submodel.plan import Plan


@dataclass(frozen=True, eq=False)
class Instruction:
    """What a client is sent: tensors of its submodel, what it needs to build that submodel, and extras.

    `model`: its own architecture, in place of a part of the run's (`sizes`). Tensors that are not sent are the client's own, as
    it left them, or those of an untrained model. `up`: the names that travel back, None for all. `local`: normalisation
    statistics stay with the clients, so they are not among the tensors and start anew. `held`: evaluate with the logits of
    classes that the client does not hold put to 0. `remembers`: the round that the client's memory is to be of.
    """

    round: int
    state: State
    sizes: dict[str, int] | None
    model: str | None = None
    masks: State = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    up: Collection[str] | None = None
    held: bool = False
    local: bool = False
    remembers: int = 0


Row = dict[str, Any]


@dataclass(eq=False)
class Assignment:
    """What one client was sent this round."""

    client: Client
    plan: Plan
    source: State  # what the plan was taken from
    state: State
    travels: State  # of `state`, what crosses the network
    up: frozenset[str]  # the tensors that are to come back
    personal: bool  # whether its model is not just a part of the global one
    extras: State = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return encoding.payload_bytes(self.travels, self.plan.masks) + encoding.payload_bytes(self.extras)
