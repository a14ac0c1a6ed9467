"""TailorFL (Deng et al., SenSys 2022), after a third-party port: the paper's body was not at hand (spec tailorfl).

Importance of filters is learned once by every client; similar clients are given similar filters; values are scaled by 1 / p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.func import functional_call

from hetfl import (
    Client,
    Exchange,
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
    flatten_state,
    hookimpl,
    running_mean,
    unflatten_state,
)
from hetfl.models.normalization import list_prunable
from hetfl.submodel.units import (
    apply_gates,
    find_gates,
    locate_gates,
    select_largest,
    sum_powers,
)
from hetfl.training.local import local_batches

Lists = dict[str, Tensor]  # for each group the kept filters, ascending


@dataclass(frozen=True, eq=False)
class ScaledSelection(Selection):
    """A selection whose weights (not biases, not norms) travel divided by the client's ratio p."""

    p: float = 1.0

    def take(self, state: State) -> State:
        return {name: t / self.p if t.ndim > 1 else t for name, t in super().take(state).items()}

    def put(self, trained: State) -> dict[str, Patch]:
        return super().put({name: t * self.p if t.ndim > 1 else t for name, t in trained.items()})


class TailorFL(Plugin):
    """Lower groups are shared (the globally strongest filters for all), upper ones personal (those important to the client)."""

    expected_failures: ClassVar[dict[str, str]] = {
        "respects_the_budget": "at its first contact a client learns importance on the whole model"
    }
    extras_down: ClassVar[dict[str, ExtraSpec]] = {"learn": ExtraSpec(1, torch.int64)}
    extras_up: ClassVar[dict[str, ExtraSpec]] = {"importance": ExtraSpec(1 << 22, ndim=1, low=0.0, high=1.0)}

    step: float = Field(0.0625, gt=0, lt=1, description="grid of the ratios p: 1, 1 - step, …")
    personal: float = Field(0.5, ge=0, le=1, description="share of the groups, the last ones, that are personal (L_p)")
    steps: int = Field(10, ge=1, description="steps in which a client learns importance, at its first contact (T_1)")
    importance_lr: float = Field(0.1, gt=0, description="SGD learning rate of the importance; the port's is not on record")
    regularise: float = Field(0.5, ge=0, description="coefficient lambda of the mean squared importance")
    tune: float = Field(
        0.05, ge=0, le=1, description="share of a personal group's filters that the server may swap a round (alpha)"
    )
    _importance: dict[int, dict[str, Tensor]] = PrivateAttr(default_factory=dict)
    _lists: dict[int, Lists] = PrivateAttr(default_factory=dict)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        strength = sum_powers(server.widths, server.state, list_prunable(server.builder.model))
        self._lists = {c: self._rank_shared(server, lists, strength) for c, lists in self._tune_lists(server).items()}
        return [self._plan(server, client, strength) for client in clients]

    def _plan(self, server: Server, client: Client, strength: Mapping[str, Tensor]) -> Plan:
        """The whole model for a client that is still to learn what is important to it (spec 1)."""
        if client.id not in self._importance:
            return server.select(torch.arange)
        p, lists = ratio(client.profile.width, self.step), self._lists.get(client.id)
        if lists is None or any(len(lists[g.name]) != filter_count(g.size, p) for g in server.widths.groups):
            own = self._importance[client.id]
            lists = {g.name: select_largest(own[g.name] ** 2, filter_count(g.size, p)) for g in server.widths.groups}
            self._lists[client.id] = lists = self._rank_shared(server, lists, strength)
        return ScaledSelection(server.widths, lists, p=p)

    def _rank_shared(self, server: Server, lists: Lists, strength: Mapping[str, Tensor]) -> Lists:
        """`lists` with the shared groups ranked anew by the global model."""
        names = [g.name for g in server.widths.groups][: self._first_personal(server)]
        return {**lists, **{name: select_largest(strength[name], len(lists[name])) for name in names}}

    def _first_personal(self, server: Server) -> int:
        """The number of the first group that is personal; those before it are shared."""
        return int(len(server.widths.groups) * (1 - self.personal))

    def _tune_lists(self, server: Server) -> dict[int, Lists]:
        """Every client's lists after the server's tuning of the personal groups, all from the lists before it (spec 2)."""
        after = {client: dict(lists) for client, lists in self._lists.items()}
        if not self.tune or len(after) < 2 or not server.widths.groups:
            return after
        last = server.widths.groups[-1].name
        alike = similarities(torch.stack([self._importance[client][last] for client in after]))
        for group in server.widths.groups[self._first_personal(server) :]:
            before = [lists[group.name] for lists in self._lists.values()]
            for i, client in enumerate(after):
                after[client][group.name] = swap_filters(i, before, alike[i], group.size, self.tune)
        return after

    @hookimpl
    def exchange(self, client: Client) -> Exchange:
        return Exchange() if client.id in self._importance else Exchange(up=())

    @hookimpl
    def client_extras(self, client: Client) -> State | None:
        return None if client.id in self._importance else {"learn": torch.tensor(self.steps)}

    @hookimpl
    def fit(self, task: Task) -> Reply | None:
        """At first contact, learns an importance for each channel of the frozen model; otherwise trains as always."""
        if "learn" not in task.extras:
            return None
        importance = self._learn(task, int(task.extras["learn"]))
        return Reply({}, len(task.data.train), {}, {"importance": torch.cat(list(importance.values()))})

    def _learn(self, task: Task, steps: int) -> dict[str, Tensor]:
        """Importance u in [0, 1] of the channels of each group, by SGD on CE(f(x; u w), y) + lambda mean u^2, w fixed (spec 1)."""
        widths, model = task.builder.widths, task.model.eval()
        where, state = locate_gates(widths, find_gates(widths, model)), dict(model.named_parameters())
        device = task.data.train.x.device
        u = {g.name: torch.ones(g.size, device=device, requires_grad=True) for g in widths.groups}
        optimizer = torch.optim.SGD(u.values(), self.importance_lr)
        for _, (x, y) in zip(range(steps), repeat_batches(task), strict=False):
            optimizer.zero_grad()
            logits = functional_call(model, apply_gates(state, u, where), (x,))
            (task.kind.loss(logits, y) + self.regularise * mean_square(u)).backward()
            optimizer.step()
            with torch.no_grad():
                for values in u.values():
                    values.clamp_(0, 1)
        model.zero_grad()
        return {name: values.detach() for name, values in u.items()}

    @hookimpl
    def recover(self, server: Server, replies: Iterable[ReceivedReply]) -> Iterator[Update]:
        sizes = [g.size for g in server.widths.groups]
        for r in replies:
            if "importance" in r.reply.extras and r.reply.extras["importance"].numel() == sum(sizes):
                parts = r.reply.extras["importance"].split(sizes)
                self._importance[r.client.id] = {g.name: p for g, p in zip(server.widths.groups, parts, strict=True)}
            p = {"p": torch.tensor(r.plan.p, dtype=torch.float64)} if isinstance(r.plan, ScaledSelection) else {}
            yield replace(update := r.update(), extras={**update.extras, **p})

    def state_dict(self) -> State:
        return flatten_state(importance=self._importance, lists=self._lists)

    def load_state_dict(self, state: State) -> None:
        self._importance, self._lists = (unflatten_state(state, kind, int) for kind in ("importance", "lists"))


class TailorFLMean(Plugin):
    """Per entry the mean of the covering clients, weighted by n / p: a smaller client's entries are fewer, and count more.

    p is the ratio that the extraction kept, which `tailorfl` says with each update; with any other it is the client's width.
    """

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        def weigh(u: Update) -> float:
            return u.weight / float(u.extras.get("p", server.clients[u.client].profile.width))

        return Merged(running_mean(server.state, updates, weigh))


def ratio(width: float, step: float) -> float:
    """The largest of 1, 1 - step, 1 - 2 step, … with p^2 <= the capacity, the width squared.

    Where not even the smallest of them that is above 0 is, the width itself: ratio(0.75, 0.3) is 0.7, ratio(0.05, 0.3) 0.05.
    """
    p = 1 - step * math.ceil((1 - width) / step - 1e-9)
    return p if p > 1e-9 else width


def filter_count(size: int, p: float) -> int:
    """Filters of a group of `size` that the ratio p keeps: floor, at least 1."""
    return max(1, int(size * p + 1e-9))


def mean_square(u: Mapping[str, Tensor]) -> Tensor:
    """(sum over groups of ||u||^2) / (number of channels)."""
    return torch.cat(list(u.values())).square().mean()


def similarities(theta: Tensor) -> Tensor:
    """Pearson correlations of the clients' importances (clients, C); 0 where one does not vary, 1 with oneself."""
    return torch.corrcoef(theta).nan_to_num(0.0).fill_diagonal_(1.0)


def swap_filters(i: int, lists: Sequence[Tensor], alike: Tensor, size: int, share: float) -> Tensor:
    """Client i's filters after swaps that bring its overlap with each other client towards similarity * the smaller list."""
    held = np.zeros((len(lists), size))
    for row, filters in zip(held, lists, strict=True):
        row[filters.numpy()] = 1
    mine, others, likeness = held[i].copy(), np.delete(held, i, 0), np.delete(alike.double().numpy(), i)
    number = int(mine.sum())
    goal = likeness * np.minimum(number, others.sum(1))
    for _ in range(max(1, int(share * min(number, size - number)))):
        wish = (goal - others @ mine) @ others
        out, into = np.where(mine > 0, wish, np.inf).argmin(), np.where(mine > 0, -np.inf, wish).argmax()
        if number == size or wish[into] <= wish[out]:
            break
        mine[out], mine[into] = 0, 1
    return torch.from_numpy(mine).nonzero().squeeze(1)


def repeat_batches(task: Task) -> Iterable[tuple[Tensor, Tensor]]:
    """The client's batches, epoch after epoch."""
    while True:
        yield from local_batches(task)
