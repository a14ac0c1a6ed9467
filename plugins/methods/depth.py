"""What the strategies share that cut depth: how deep a client's model is, and tensors that each size has for itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from hetfl import (
    Client,
    Field,
    Merged,
    NotApplicable,
    Patch,
    Plan,
    Plugin,
    Server,
    Update,
    Updates,
    hookimpl,
    mean,
    unit_count,
)
from hetfl.models.early_exit import add_exits

By = Literal["parameters", "number"]

BY = "what a width r means: as many as r^2 of the parameters hold (the budget of every strategy), or the share r of their number"


class EarlyExits(Plugin):
    """A model with exits: its own ones (docs/strategies/scalefl.md), or else heads after its stages."""

    tasks = ("classify", "regress", "multilabel")
    tasks_why = "an exit answers for the mean over an example's positions, not for each token"

    exits: int = Field(4, ge=1, description="exits of the whole model, its own last one included")
    convs: int = Field(3, ge=0, description="3x3 convolutions in the head of an exit, where features are images")

    @hookimpl
    def adapt_model(self, model: nn.Module, x: Tensor, classes: int) -> nn.Module:
        return model if hasattr(model, "at_depth") else add_exits(model, x, classes, self.exits, self.convs)


def count_layers(server: Server, client: Client, number: int, plan: Callable[[int], Plan], by: By) -> int:
    """How many of `number` exits or blocks the client affords, at least 1; `plan(n)` is the submodel of n of them.

    By "number" the share `width` of them, rounded up; by "parameters" the most whose submodel is within its budget.
    """
    if by == "number":
        return unit_count(number, client.profile.width)
    return next((n for n in range(number, 1, -1) if server.share(plan(n)) <= client.profile.parameters), 1)


def list_blocks(server: Server) -> tuple[str, ...]:
    """The model's residual blocks in order of execution. Raises NotApplicable where it has none."""
    if not server.blocks:
        raise NotApplicable("not applicable: the model has no residual blocks that could be left out (hfl inspect lists them)")
    return server.blocks


def name_level(server: Server, client: int) -> str:
    """The name of the branch in which the clients of this one's capacity have what is theirs alone."""
    return f"level {server.clients[client].profile.level}"


def merge_by_level(server: Server, updates: Updates, own: Callable[[Update], Collection[str]], weighting: str) -> Merged:
    """Per entry the mean over the clients that cover it, the tensors `own(update)` only among clients of one level.

    Each level has its own in a branch; the global model has those of the highest level that ever took part.
    """
    apart = {u.client: frozenset(own(u)) for u in updates}

    def average(chosen: Updates, belongs: Callable[[str, int], bool]) -> dict[str, Patch]:
        kept = [replace(u, patches={n: p for n, p in u.patches.items() if belongs(n, u.client)}) for u in chosen]
        state = mean(Updates(kept, chosen.old), chosen.votes(weighting))
        names = {name for u in kept for name in u.patches}
        return {name: Patch(tensor) for name, tensor in state.items() if name in names}

    merged = {n: p.values for n, p in average(updates, lambda name, client: name not in apart[client]).items()}
    branches, before = dict(server.branches), dict(server.branches)
    for level in dict.fromkeys(name_level(server, u.client) for u in updates):
        members = updates.among(lambda u, at=level: name_level(server, u.client) == at, server.branch(level))  # type: ignore[misc]
        branches[level] = {**before.get(level, {}), **average(members, lambda name, client: name in apart[client])}
    highest = max(branches, key=lambda level: float(level.split()[-1]))
    return Merged({**server.state, **merged, **{n: p.values for n, p in branches[highest].items()}}, branches)
