"""The values that server hooks are given and answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hetfl.aggregation.updates import Update
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.submodel.plan import Patches, Plan
from hetfl.training.task import Reply


@dataclass(frozen=True)
class Client:
    """A sampled client as the server sees it: `last_round` is that of its last valid reply (0: none), `extras` came with it."""

    id: int
    profile: Profile
    extras: State = field(default_factory=dict)
    last_round: int = 0


@dataclass(frozen=True)
class Exchange:
    """Names of the tensors that travel `down` to a client and back `up`; None: all. What does not travel stays with the client."""

    down: Collection[str] | None = None
    up: Collection[str] | None = None


@dataclass(frozen=True, eq=False)
class Coverage:
    """Where one client's update lay: `patches` have no values; `more`: whether it sent more than its tensors."""

    client: int
    patches: Patches
    more: bool


@dataclass(frozen=True, eq=False)
class ReceivedReply:
    """A client's valid reply, what it was sent, and the plan that it trained (narrower than sent, if it cut more)."""

    client: Client
    plan: Plan
    sent: State
    reply: Reply

    def update(self) -> Update:
        """What the client trained, at the places that its plan took it from."""
        return Update(self.client.id, self.plan.put(self.reply.state), float(self.reply.examples), self.reply.extras)


@dataclass(frozen=True)
class ExtraSpec:
    """Bounds of a named tensor that a plugin sends beside the weights: most elements, and its dtype."""

    elements: int
    dtype: torch.dtype = torch.float32

    def admits(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dtype == self.dtype and tensor.numel() <= self.elements
