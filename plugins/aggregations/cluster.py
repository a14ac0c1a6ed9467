"""DAC's aggregation: a mean within each architecture, and nothing between them (spec dac 1 iv)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from hetfl import Client, Field, Merged, Patch, Plugin, Server, State, Update, Updates, hookimpl, mean


class Cluster(Plugin):
    """Clients of the same budget are a federation of their own, with a branch of the server as its model.

    The global model is the mean over all clients that cover an entry; it is only looked at, no cluster starts from it. Where an
    extraction gives the clients of a budget other entries every round (rolling windows), these are taken from the cluster's model.
    """

    weighting: Literal["samples", "uniform"] = Field("samples", description="one vote an example (n_k), or one a client")

    @property
    def takes_own_models(self) -> bool:
        return True

    @hookimpl
    def base_state(self, server: Server, client: Client) -> State | None:
        return server.branch(name_branch(client))

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        updates = Updates(updates, server.state)
        branches = dict(server.branches)
        for cluster in dict.fromkeys(name_branch(server.clients[u.client]) for u in updates):
            members = updates.among(lambda u, at=cluster: name_branch(server.clients[u.client]) == at)  # type: ignore[misc]
            before = self.base_state(server, server.clients[members[0].client]) or server.state
            state = mean(members.among(lambda u: True, {**own_tensors(members[0]), **before}), members.votes(self.weighting))
            branches[cluster] = {n: Patch(tensor) for n, tensor in state.items()}
        return Merged(mean(updates, updates.votes(self.weighting)), branches)


def name_branch(client: Client) -> str:
    """The name of the branch that the clients of this client's budget share."""
    return f"level {client.profile.level}"


def own_tensors(update: Update) -> State:
    """The tensors that an update has and the global model perhaps has not: those of an own architecture."""
    return {n: patch.values for n, patch in update.patches.items() if ":" in n}
