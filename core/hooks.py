"""The moments of a round that a plugin can answer. docs/hooks.md says more of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from hetfl.core.merge import Merged, Update, Updates
    from hetfl.core.plans import Plan
    from hetfl.core.server import Server
    from hetfl.core.types import Client, Node, Profile, Reply, Returned, Task

hookspec = pluggy.HookspecMarker("hetfl")
hookimpl = pluggy.HookimplMarker("hetfl")


@hookspec
def prepare(server: Server) -> None:
    """Server, once before round 1: work that precedes training. All chosen plugins are called."""


@hookspec(firstresult=True)
def profile(node: Node) -> Profile | None:
    """Node, every round: what this device can afford. Default: the full width."""


@hookspec(firstresult=True)
def extract(server: Server, clients: Sequence[Client], round: int) -> list[Plan] | None:
    """Server: one plan for each of the round's clients, in their order. Default: the whole model for everyone."""


@hookspec(firstresult=True)
def fit(task: Task) -> Reply | None:
    """Client: local training. Wrap it (`hookimpl(wrapper=True)`) to change the task before or the reply after."""


@hookspec(firstresult=True)
def recover(server: Server, replies: Sequence[Returned], round: int) -> Iterable[Update] | None:
    """Server: the replies in global coordinates. Default: each reply put back where its plan took it."""


@hookspec(firstresult=True)
def aggregate(server: Server, updates: Updates, round: int) -> Merged | None:
    """Server: the next global model. Default: the mean over the clients that cover an entry."""
