"""What the core does where no plugin answers a hook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hetfl.aggregation.mean import running_mean
from hetfl.aggregation.updates import Merged, Update, by_client
from hetfl.hooks.hookspecs import hookimpl
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client, ReceivedReply
from hetfl.models.state import State
from hetfl.profiling.node import Node, Profile
from hetfl.submodel.plan import Plan
from hetfl.training import local
from hetfl.training.task import Reply, Task


class Defaults:
    """What the core does where no plugin answers."""

    @hookimpl
    def sample(self, server: Server, clients: Sequence[Client], round: int) -> list[int]:
        order = torch.randperm(len(clients), generator=server.sample_stream(round))
        return [clients[place].id for place in order[: server.wanted].tolist()]

    @hookimpl
    def profile(self, node: Node) -> Profile:
        return Profile()

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(torch.arange) for _ in clients]

    @hookimpl
    def base_state(self, server: Server) -> State:
        return server.state

    @hookimpl
    def fit(self, task: Task) -> Reply:
        return (task.train or local.fit)(task)

    @hookimpl
    def recover(self, replies: Iterable[ReceivedReply]) -> Iterable[Update]:
        return (reply.update() for reply in replies)

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        return Merged(running_mean(server.state, updates, by_client))
