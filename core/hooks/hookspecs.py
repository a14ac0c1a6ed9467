"""The moments of a round that a plugin can answer. docs/hooks.md says more of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hetfl.aggregation.updates import Merged, Update
    from hetfl.hooks.server import Server
    from hetfl.hooks.values import Client, Coverage, Exchange, ReceivedReply
    from hetfl.models.state import State
    from hetfl.profiling.node import Node, Profile
    from hetfl.submodel.plan import Plan
    from hetfl.training.task import Reply, Task

hookspec = pluggy.HookspecMarker("hetfl")

hookimpl = pluggy.HookimplMarker("hetfl")


@hookspec(firstresult=True)
def adapt_model(model: nn.Module, x: Tensor, classes: int) -> nn.Module | None:
    """Everywhere, before the widths are traced: the model to use in place of `model`. Default: `model`."""


@hookspec
def prepare(server: Server) -> None:
    """Server, once before round 1: work that precedes training. All chosen plugins are called."""


@hookspec(firstresult=True)
def sample(server: Server, clients: Sequence[Client], round: int) -> Sequence[int] | None:
    """Server: the ids of the round's clients, `server.wanted` of those that are there. Default: each with the same chance."""


@hookspec(firstresult=True)
def profile(node: Node) -> Profile | None:
    """Node, every round: what this device can afford. Default: the full width."""


@hookspec
def allot(server: Server, clients: Sequence[Client], widths: Sequence[float], round: int) -> Sequence[float] | None:
    """Server: the width of each of the round's clients, at most what its device affords. Each chosen plugin gets as `widths` what
    the one before made. Default: what they afford."""


@hookspec(firstresult=True)
def extract(server: Server, clients: Sequence[Client], round: int) -> Sequence[Plan | None] | None:
    """Server: a plan for each of the round's clients, in their order; None: it sits out. Default: the whole model for everyone."""


@hookspec(firstresult=True)
def base_state(server: Server, client: Client) -> State | None:
    """Server: the state that this client's plan is taken from, a branch of its own. Default: the global model."""


@hookspec
def exchange(server: Server, client: Client, names: Collection[str]) -> Exchange | None:
    """Server: which of the tensors `names` travel to and from this client; the others stay with it. Default: all."""


@hookspec
def client_extras(server: Server, client: Client, plan: Plan, round: int) -> State | None:
    """Server: the extras that travel to this client beside its submodel. All chosen plugins are asked."""


@hookspec(firstresult=True)
def fit(task: Task) -> Reply | None:
    """Client: local training. Wrap it (`hookimpl(wrapper=True)`) to change the task before or the reply after."""


@hookspec
def encode_down(server: Server, state: State, round: int) -> State | None:
    """Server: what travels to a client in place of the tensors `state`. Each plugin gets what the one before made, from the inside
    out: extraction, aggregation, wraps from the last to the first."""


@hookspec
def decode_down(encoded: State, like: State, round: int) -> State | None:
    """Client, and server beside it: the inverse of `encode_down`, by the plugins in the reverse order; in the end in the shapes of
    `like`."""


@hookspec
def encode(task: Task, update: State, sent: State) -> State | None:
    """Client, after `fit`: what travels in place of `update`, what it changed of the tensors `sent`. Each plugin gets what the one
    before made, from the inside out: training, extraction, aggregation, wraps from the last to the first."""


@hookspec
def decode(server: Server, client: Client, encoded: State, sent: State, round: int) -> State | None:
    """Server: the inverse of `encode`, by the plugins in the reverse order; in the end an update in the shapes of `sent`."""


@hookspec
def receive(server: Server, received: ReceivedReply, round: int) -> ReceivedReply | None:
    """Server: a client's reply, decoded and checked, as it is to count. Each chosen plugin gets what the one before made."""


@hookspec(firstresult=True)
def recover(server: Server, replies: Iterable[ReceivedReply], round: int) -> Iterable[Update] | None:
    """Server: the replies in global coordinates, in client order. Default: each reply put back where its plan took it.

    Replies come as clients answer. Yield an update for each as it comes, or ask for `list(replies)` where all are needed.
    """


@hookspec(firstresult=True)
def aggregate(server: Server, updates: Iterable[Update], round: int) -> Merged | None:
    """Server: the next global model. Default: the mean over the clients that cover an entry.

    Updates come as clients answer, in client order. `running_mean` takes them one by one and holds none of them;
    `Updates(updates, server.state)` holds all.
    """


@hookspec
def finalize(server: Server, merged: Merged, covered: Sequence[Coverage], round: int) -> Merged | None:
    """Server, after the aggregation: the next global model as it is to be. Each chosen plugin gets what the one before made."""
