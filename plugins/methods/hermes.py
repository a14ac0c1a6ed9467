"""Hermes (Li et al., MobiCom 2021): structured personal submodels; only what several clients share is averaged (spec hermes)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from hetfl import (
    Client,
    ExtraSpec,
    Field,
    Merged,
    Patch,
    Plan,
    Plugin,
    ReceivedReply,
    Reply,
    Selection,
    Server,
    State,
    Task,
    Update,
    Updates,
    flatten_state,
    hookimpl,
    mean,
    unflatten_state,
    unit_count,
)
from hetfl.models.normalization import list_prunable
from hetfl.plugins.methods.pruning import BUDGET, choose_share, note_remaining, send_budget
from hetfl.submodel.blocks import take
from hetfl.submodel.units import select_largest, sum_powers


class Hermes(Plugin):
    """A client whose model is good enough drops its weakest channels; a group lasso makes channels weak.

    The remaining share is one of parameters, so of every group its square root remains. Clients start with the whole model.
    """

    expected_failures: ClassVar[dict[str, str]] = {"respects_the_budget": "clients start whole and prune themselves"}
    extras_down: ClassVar[dict[str, ExtraSpec]] = {"budget": BUDGET}

    rate: float = Field(0.2, gt=0, lt=1, description="share of the parameters that a pruning removes (r_p)")
    threshold: float = Field(0.5, ge=0, le=1, description="accuracy on held-back training data above which a client prunes")
    target: float | None = Field(
        None, gt=0, le=1, description="share that remains in the end (none: the client's parameter budget)"
    )
    clamp: bool = Field(True, description="end exactly on the target, as the paper's sizes suggest")
    lasso: float = Field(1e-4, ge=0, description="coefficient of the group lasso; the paper does not give it")
    _kept: dict[int, dict[str, Tensor]] = PrivateAttr(default_factory=dict)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(self._kept.get(client.id, torch.arange)) for client in clients]

    @hookimpl
    def client_extras(self, client: Client) -> State:
        return send_budget(client)

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        kept = dict[str, Tensor]()
        after = choose_share(task, self.rate, self.threshold, self.target, self.clamp)
        if after is not None:
            kept = choose_strongest(task, after**0.5)
            note_remaining(task, after)
            task.cut(kept)
        if self.lasso:
            task.penalties.append(lambda model: self.lasso * group_lasso(model))
        reply = yield
        reply.kept = kept
        return reply

    @hookimpl
    def recover(self, replies: Iterable[ReceivedReply]) -> Iterator[Update]:
        for r in replies:
            if isinstance(r.plan, Selection):
                self._kept[r.client.id] = dict(r.plan.kept)
            yield r.update()

    def state_dict(self) -> State:
        return flatten_state(kept=self._kept)

    def load_state_dict(self, state: State) -> None:
        self._kept = unflatten_state(state, "kept", int)


class HermesMean(Plugin):
    """Entries that several clients hold become their mean for each holder; the others stay as each client left them (Alg. 1)."""

    overlap: Literal["any", "all"] = Field(
        "any", description="averaged is what two or more hold, or what all clients of the round do"
    )
    weighting: Literal["uniform", "samples"] = Field("uniform", description="one vote a client, or one an example")

    @hookimpl
    def base_state(self, server: Server, client: Client) -> State | None:
        """The client's own model, once it has one."""
        return server.branch(f"client {client.id}")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        updates = Updates(updates, server.state)
        state, voices = mean(updates, updates.votes(self.weighting)), updates.votes("uniform")
        least = len(updates) if self.overlap == "all" else 2
        shared = {name: updates.cover(name, voices) >= least for name in updates.averaged()}
        own = {f"client {u.client}": personalise(u.patches, state, shared) for u in updates}
        return Merged(state, {**server.branches, **own})


def personalise(patches: Mapping[str, Patch], state: State, shared: State) -> dict[str, Patch]:
    """A client's patches with the mean `state` wherever an entry is `shared` (bool, broadcastable to the tensor's shape)."""
    own = dict(patches)
    for name, patch in patches.items():
        if name in shared:
            average, among = (take(t, patch.index) for t in (state[name], shared[name].expand(state[name].shape)))
            own[name] = Patch(torch.where(among, average, patch.values), patch.index, patch.coverage)
    return own


def choose_strongest(task: Task, ratio: float) -> dict[str, Tensor]:
    """The strongest channels of each group by the L2 norm of what makes them, so many that `ratio` of the whole group is left."""
    strength = sum_powers(task.builder.widths, task.pad_state(), list_prunable(task.model), 2)
    sizes = {name: min(size, unit_count(task.full_sizes[name], ratio)) for name, size in task.plan_sizes.items()}
    return {name: select_largest(strength[name][: task.plan_sizes[name]], size) for name, size in sizes.items()}


def group_lasso(model: nn.Module) -> Tensor:
    """Sum of the L2 norms of every filter and every input channel of convolutions and linear layers (spec 2, eqs. 2 and 3)."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return torch.stack([lasso(m.weight) for m in model.modules() if isinstance(m, layers)]).sum()


def lasso(weight: Tensor) -> Tensor:
    """sum_f ||W[f]|| + sum_c ||W[:, c]||; the gradient at an all-zero group is 0."""
    ways = weight.flatten(1), weight.transpose(0, 1).flatten(1)
    return torch.stack([torch.linalg.vector_norm(rows, dim=1).sum() for rows in ways]).sum()
