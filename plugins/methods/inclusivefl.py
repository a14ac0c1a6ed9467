"""InclusiveFL (Liu et al., KDD 2022): models of the first layers, whose last layer learns from the deeper layers of others."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from hetfl import (
    Client,
    Field,
    Merged,
    NotApplicable,
    Plan,
    Plugin,
    Server,
    State,
    Update,
    Updates,
    flatten_state,
    hookimpl,
    mean,
    unflatten_state,
)
from hetfl.plugins.methods.depth import BY, By, count_layers, list_blocks, merge_by_level, name_level
from hetfl.submodel.blocks import take


class InclusiveFL(Plugin):
    """The first residual blocks, as many as the client affords, and everything that is in no block."""

    expected_failures: ClassVar[dict[str, str]] = {
        "respects_the_budget": "who can afford no block gets the first one, with all that is in none"
    }

    by: By = Field("parameters", description=BY)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        blocks = list_blocks(server)
        plans = {n: server.select(blocks=blocks[:n]) for n in range(1, len(blocks) + 1)}
        return [plans[count_layers(server, client, len(blocks), plans.__getitem__, self.by)] for client in clients]


class InclusiveMean(Plugin):
    """The mean over those who have a layer; each size's last layer and head are averaged within the size alone.

    Momentum distillation: a size's last layer moves by (1 - beta) of its own mean change and beta of the mean change that the next
    larger size made, in the round before, to its layers from there on.
    """

    weighting: Literal["samples", "uniform"] = Field("samples", description="one vote an example (n_k), or one a client")
    beta: float = Field(0.2, ge=0, le=1, description="weight of the larger model's change (mom_beta); 0: no distillation")
    own_last: bool = Field(True, description="the last layer of each size is its own (local_one)")
    own_head: bool = Field(True, description="what follows the last layer, pooler and classifier, is (local_pooler, local_cls)")
    _changes: dict[str, State] = {}

    @hookimpl
    def base_state(self, server: Server, client: Client) -> State | None:
        return server.branch(name_level(server, client.id))

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        updates, blocks = Updates(updates, server.state), list_blocks(server)
        depths, head = {u.client: count_first(blocks, u) for u in updates}, list_head(server, blocks)
        before = {u.client: server.branch(name_level(server, u.client)) or server.state for u in updates}
        moved = Updates([self._distil(u, before[u.client], blocks, depths[u.client]) for u in updates], server.state)
        self._changes = {**self._changes, **self._change_levels(server, updates, before)}

        def own(update: Update) -> list[str]:
            last = f"{blocks[depths[update.client] - 1]}."
            return [n for n in update.patches if (self.own_head and n in head) or (self.own_last and n.startswith(last))]

        return merge_by_level(server, moved, own, self.weighting)

    def _change_levels(self, server: Server, updates: Updates, before: Mapping[int, State]) -> dict[str, State]:
        """For each size of the round the mean change of the layers that its clients have, parameters alone."""
        trained, found = {name for name, _ in server.builder.model.named_parameters()}, {}
        for level in dict.fromkeys(name_level(server, u.client) for u in updates):
            members = updates.among(lambda u, at=level: name_level(server, u.client) == at)  # type: ignore[misc]
            old, names = before[members[0].client], {name for u in members for name in u.patches} & trained
            new = mean(Updates(members, {name: old[name] for name in names}), members.votes(self.weighting))
            found[level] = {name: new[name] - old[name] for name in sorted(names)}
        return found

    def _distil(self, update: Update, before: State, blocks: Sequence[str], depth: int) -> Update:
        """The update with its last layer moved by (1 - beta) of its change and beta of what the next larger size taught."""
        patches = dict(update.patches)
        for name, taught in self._taught(blocks, depth).items() if self.beta else ():
            if name in patches:
                patch = patches[name]
                old, other = (take(t, patch.index) for t in (before[name], taught))
                patches[name] = replace(patch, values=old + (1 - self.beta) * (patch.values - old) + self.beta * other)
        return replace(update, patches=patches)

    def _taught(self, blocks: Sequence[str], depth: int) -> State:
        """For the tensors of layer number `depth` the mean change, the round before, of the next larger size's layers from it on.

        Empty where no size is larger.
        """
        counted = [(sum(any(n.startswith(f"{b}.") for n in c) for b in blocks), c) for c in self._changes.values()]
        larger = [pair for pair in counted if pair[0] > depth]
        if not larger:
            return {}
        number, change = min(larger, key=lambda pair: pair[0])
        last, found = blocks[depth - 1], {}
        for name in (n for n in change if n.startswith(f"{last}.")):
            same = [change[n] for b in blocks[depth - 1 : number] if (n := b + name.removeprefix(last)) in change]
            found[name] = torch.stack([t for t in same if t.shape == change[name].shape]).mean(0)
        return found

    def state_dict(self) -> State:
        return flatten_state(changes=self._changes)

    def load_state_dict(self, state: State) -> None:
        self._changes = unflatten_state(state, "changes", ast.literal_eval)


def count_first(blocks: Sequence[str], update: Update) -> int:
    """How many of the first blocks an update has. Raises NotApplicable where it has others, or none."""
    there = [any(name.startswith(f"{block}.") for name in update.patches) for block in blocks]
    number = sum(there)
    if not number or not all(there[:number]):
        raise NotApplicable("not applicable: a client has other layers than the first ones; --extract inclusivefl keeps these")
    return number


def list_head(server: Server, blocks: Sequence[str]) -> list[str]:
    """The tensors that follow the last block in the model's order: pooler and classifier."""
    names = list(server.state)
    last = max(i for i, name in enumerate(names) if name.startswith(f"{blocks[-1]}."))
    return names[last + 1 :]
