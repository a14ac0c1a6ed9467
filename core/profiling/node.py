"""A device as its profile plugin sees it, and what it affords."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetfl.rng import stream

if TYPE_CHECKING:
    from hetfl.profiling.cost import Cost


def refuse_measuring(ratio: float) -> Any:
    raise NotImplementedError("this node cannot measure")


@dataclass(frozen=True)
class Node:
    """Where a client lives, as its profile plugin sees it: client `client` of `clients`, in round `round`.

    `cost(ratio)` is what the submodel of a width ratio costs, `probe(ratio)` the seconds of one training step of it on this
    machine; `examples` and `steps` are those of a round's training, epochs counted.
    """

    client: int
    clients: int
    round: int
    seed: int
    cost: Callable[[float], Cost] = refuse_measuring
    probe: Callable[[float], float] = refuse_measuring
    examples: int = 0
    steps: int = 0

    def stream(self, purpose: str, each_round: bool = True) -> torch.Generator:
        return stream(self.seed, purpose, self.round if each_round else 0, self.client)


@dataclass(frozen=True)
class Profile:
    """What a device can afford: `width`, the REMAINING width ratio in (0, 1], and `binding`, what keeps it from more."""

    width: float = 1.0
    bottleneck: str = ""

    @property
    def parameters(self) -> float:
        """The parameter budget that goes with the width: about its square, as a share of the model's parameters."""
        return self.width**2

    @property
    def level(self) -> str:
        """The name under which clients of this capacity are reported."""
        return f"{self.width:g}"
