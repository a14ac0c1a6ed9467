"""The values that plugins see: a device's profile, a sampled client, a client's task and its reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.core.config import RunOptions
from hetfl.core.data import Holding
from hetfl.core.plans import Plan
from hetfl.core.streams import stream
from hetfl.core.widths import State

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Node:
    """Where a client lives, as its profile plugin sees it: client `client` of `clients`, in round `round`."""

    client: int
    clients: int
    round: int
    seed: int

    def stream(self, purpose: str, each_round: bool = True) -> torch.Generator:
        return stream(self.seed, purpose, self.round if each_round else 0, self.client)


@dataclass(frozen=True)
class Profile:
    """What a device can afford: `width`, the REMAINING width ratio in (0, 1]; parameters scale with about its square."""

    width: float = 1.0

    @property
    def level(self) -> str:
        """The name under which clients of this capacity are reported."""
        return f"{self.width:g}"


@dataclass(frozen=True)
class Client:
    """A sampled client as the server sees it, with the extras of its last reply (empty before the first)."""

    id: int
    profile: Profile
    extras: State = field(default_factory=dict)


@dataclass(eq=False)
class Task:
    """One client's work in one round. `fit` wrappers may change any field before they yield."""

    client: int
    round: int
    model: nn.Module
    data: Holding
    options: RunOptions
    plan_sizes: dict[str, int]
    full_sizes: dict[str, int]
    extras: State
    memory: State
    draws: bool = False
    loss: Loss = nn.functional.cross_entropy
    penalties: list[Callable[[nn.Module], Tensor]] = field(default_factory=list)

    def stream(self, purpose: str) -> torch.Generator:
        """The client's own random stream for `purpose` in this round."""
        return stream(self.options.seed, purpose, self.round, self.client)


@dataclass(eq=False)
class Reply:
    """What a client sends back: its trained tensors, extras and metrics; `plan` only if it trained less than was sent."""

    state: State
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    plan: Plan | None = None


@dataclass(frozen=True, eq=False)
class Returned:
    """A client's valid reply beside the plan it was sent, as `recover` gets it."""

    client: Client
    plan: Plan
    sent: State
    reply: Reply


@dataclass(frozen=True)
class Extra:
    """Bounds of a named tensor that a plugin sends beside the weights: most elements, and its dtype."""

    elements: int
    dtype: torch.dtype = torch.float32

    def admits(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dtype == self.dtype and tensor.numel() <= self.elements
