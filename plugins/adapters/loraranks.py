"""Adapters of other ranks for other clients: HetLoRA (Cho et al., EMNLP 2024), and FedRolex and Federated Dropout on ranks."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hetfl import Client, Field, Plan, Plugin, ReceivedReply, Reply, Server, State, Task, hookimpl, unit_count, window
from hetfl.models.adapters import Adapter
from hetfl.submodel.blocks import take
from hetfl.submodel.ranks import find_rank_groups
from hetfl.submodel.widths import Group, within


class LoraRanks(Plugin):
    """A client of width r gets `ceil(r * rank)` ranks of every adapter; all other layers are whole.

    With `prune` clients prune themselves (HetLoRA): the last ranks are held down in training, and where their norm fell below that
    of before, the client keeps the first of its ranks from then on.
    """

    expected_failures: ClassVar[dict[str, str]] = {
        "respects_the_budget": "a width is the share of an adapter's ranks; the layers that are trained whole come on top of it"
    }

    mode: Literal["prefix", "window", "random"] = Field(
        "prefix", description="the first ranks (HetLoRA), a window that rolls on every round, or random ones every round"
    )
    step: int = Field(1, ge=1, description="ranks that the window moves each round")
    prune: float = Field(0.0, ge=0, lt=1, description="share of its ranks that a client which prunes itself keeps; 0: none does")
    penalty: float = Field(0.01, ge=0, description="weight of the last ranks' norms in the loss, where clients prune themselves")
    _ranks: dict[int, dict[str, int]] = {}

    @property
    def inactive_hooks(self) -> Collection[str]:
        return () if self.prune else ("fit", "receive")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        ranks = find_rank_groups(server.widths)
        return [
            server.select({g.name: self._units(server, g, c, round) if g.name in ranks else torch.arange(g.size)
                           for g in server.widths.groups})
            for c in clients
        ]  # fmt: skip

    def _units(self, server: Server, group: Group, client: Client, round: int) -> Tensor:
        """The ranks of one adapter that a client gets, (number,)."""
        count = unit_count(group.size, client.profile.width)
        count = min(count, self._ranks.get(client.id, {}).get(group.name, count))
        if self.mode == "window":
            return window(group, count / group.size, self.step * (round - 1))
        if self.mode == "random":
            order = torch.randperm(group.size, generator=server.stream(f"ranks {group.name}", round, client.id))
            return order[:count].sort().values
        return torch.arange(count)

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        tails = {g: (a, unit_count(task.plan_sizes[g], self.prune)) for g, a in find_rank_groups(task.builder.widths).items()}
        halves = list_values(task.model)
        before = {group: tail_norm(halves, *tail).item() for group, tail in tails.items()}
        task.penalties.append(partial(sum_tails, tails=list(tails.values()), penalty=self.penalty))
        reply = yield
        after = {group: tail_norm({**halves, **reply.state}, *tail).item() for group, tail in tails.items()}
        reply.kept = {g: torch.arange(first) for g, (_, first) in tails.items() if after[g] < before[g]}
        index = within(task.builder.widths, task.plan_sizes, reply.kept) if reply.kept else {}
        reply.state = {name: take(tensor, index.get(name, {})) for name, tensor in reply.state.items()}
        return reply

    @hookimpl
    def receive(self, received: ReceivedReply) -> None:
        if pruned := {group: len(units) for group, units in received.reply.kept.items()}:
            client = received.client.id
            self._ranks = {**self._ranks, client: {**self._ranks.get(client, {}), **pruned}}

    def state_dict(self) -> State:
        return {f"{client}/{group}": torch.tensor(n) for client, counts in self._ranks.items() for group, n in counts.items()}

    def load_state_dict(self, state: State) -> None:
        self._ranks = {}
        for key, count in state.items():
            client, group = key.split("/", 1)
            self._ranks.setdefault(int(client), {})[group] = int(count)


def list_values(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model` by name, with those of a frozen half."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def tail_norm(state: Mapping[str, Tensor], adapter: Adapter, first: int) -> Tensor:
    """||B[:, first:]|| ||A[first:]||: how much the ranks from `first` on can matter; 0 where there are none."""
    a, b = state[adapter.a][first:], state[adapter.b][:, first:]
    norm: Tensor = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return norm


def sum_tails(model: nn.Module, tails: Sequence[tuple[Adapter, int]], penalty: float) -> Tensor:
    """The penalty on the last ranks of all adapters."""
    halves = list_values(model)
    return penalty * torch.stack([tail_norm(halves, *tail) for tail in tails]).sum()
