"""A device as its profile plugin sees it, and what it affords."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hetfl.rng import stream

if TYPE_CHECKING:
    from hetfl.profiling.cost import Cost
    from hetfl.profiling.device import Device


def refuse_measuring(ratio: float) -> Any:
    """The default of Node.cost and Node.probe: raises NotImplementedError."""
    raise NotImplementedError("this node cannot measure")


@dataclass(frozen=True)
class Node:
    """The device of one client, as its profile plugin sees it in one round.

    client, clients   the client's id, counted from 0, and the number of all clients
    round, seed       the round, counted from 1, and the run's seed
    cost              cost(ratio): the Cost of the submodel of width `ratio`
    probe             probe(ratio): seconds of one training step of that submodel, timed on this machine
    examples, steps   training examples and steps of a round, all epochs together
    global_width      the width of the run's own model, as a share of the model's (--global-width)
    device, deadline  the client's device under --fleet, and the simulated seconds that a round may take; None: none
    """

    client: int
    clients: int
    round: int
    seed: int
    cost: Callable[[float], Cost] = refuse_measuring
    probe: Callable[[float], float] = refuse_measuring
    examples: int = 0
    steps: int = 0
    global_width: float = 1.0
    device: Device | None = None
    deadline: float | None = None

    def stream(self, purpose: str, each_round: bool = True) -> torch.Generator:
        """The client's own random stream for `purpose`: of this round, or the same in every round."""
        return stream(self.seed, purpose, self.round if each_round else 0, self.client)


@dataclass(frozen=True)
class Profile:
    """What a device can afford: `width`, the REMAINING width ratio in (0, 1]; `bottleneck` says what keeps it from more."""

    width: float = 1.0
    bottleneck: str = ""

    @property
    def parameters(self) -> float:
        """The parameter budget that goes with the width: about its square, as a share of the model's parameters."""
        return self.width**2

    @cached_property
    def level(self) -> str:
        """The name under which clients of this capacity are reported: the width, as 0.5."""
        return f"{self.width:g}"
