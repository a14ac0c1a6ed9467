"""The values that server hooks are given and answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
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
    """A client as the server sees it: `last_round` is that of its last valid reply (0: none), `extras` came with it.

    `last` is its line of clients.csv of the last round that it took part in, empty before.
    """

    id: int
    profile: Profile
    extras: State = field(default_factory=dict)
    last_round: int = 0
    last: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """Names of the tensors that travel `down` to a client and back `up`; None: all. What does not travel stays with the client.

    `lasting`: of those that do not travel up, the ones that the client keeps for its next round; None: all.
    """

    down: Collection[str] | None = None
    up: Collection[str] | None = None
    lasting: Collection[str] | None = None

    def __and__(self, other: Exchange) -> Exchange:
        """What travels under both."""

        def both(a: Collection[str] | None, b: Collection[str] | None) -> Collection[str] | None:
            return b if a is None else a if b is None else frozenset(a) & frozenset(b)

        return Exchange(both(self.down, other.down), both(self.up, other.up), both(self.lasting, other.lasting))


@dataclass(frozen=True, eq=False)
class Coverage:
    """Where one client's update lay: `patches` have no values; `more`: whether it sent more than its tensors."""

    client: int
    patches: Patches
    more: bool

    @classmethod
    def of(cls, update: Update, more: bool) -> Coverage:
        """That of an update."""
        return cls(update.client, {name: replace(p, values=torch.empty(0)) for name, p in update.patches.items()}, more)


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
    """Bounds of a named tensor that a plugin sends beside the weights: most elements, its dtype, its number of dims (None: any)
    and the range of its values. NaN and infinity are never admitted."""

    elements: int
    dtype: torch.dtype = torch.float32
    ndim: int | None = None
    low: float = -math.inf
    high: float = math.inf

    def admits(self, tensor: Any) -> bool:
        """Whether `tensor` is within the bounds."""
        if not isinstance(tensor, Tensor) or tensor.dtype != self.dtype or tensor.numel() > self.elements:
            return False
        if self.ndim not in (None, tensor.ndim) or not tensor.numel():
            return self.ndim in (None, tensor.ndim)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return False
        return self.low <= float(tensor.min()) and float(tensor.max()) <= self.high
