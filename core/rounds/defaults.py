"""What the core does where no plugin answers a hook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hetfl.aggregation.mean import Fold, MeanAggregator
from hetfl.aggregation.updates import Update, by_client
from hetfl.hooks.hookspecs import hookimpl
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client, ReceivedReply, put_back
from hetfl.models.state import State
from hetfl.profiling.node import Node, Profile
from hetfl.submodel.plan import Plan
from hetfl.training import local
from hetfl.training.task import Reply, Task


class Defaults:
    """What the core does where no plugin answers."""

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
        return local.fit(task)

    @hookimpl
    def recover(self, replies: Sequence[ReceivedReply]) -> Iterable[Update]:
        return [put_back(r) for r in replies]

    @hookimpl
    def fold(self, server: Server) -> Fold:
        return MeanAggregator(server.state, by_client)
