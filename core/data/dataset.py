"""Examples in memory, and which client, or the server, holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hetfl.data.inputs import Inputs
from hetfl.data.kinds import CLASSIFY, TaskKind


@dataclass(frozen=True, eq=False)
class Examples:
    """Some rows of a data set: batches are taken by index, so that all clients share one copy of its tensors."""

    x: Tensor  # (N, *shape): float32, normalised, or int64 token ids
    y: Tensor  # int64 (N,), or what targets of another kind are
    index: Tensor  # int64 (len,): the rows of x and y, ascending
    kind: TaskKind = CLASSIFY  # what the targets are

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches x (size, *shape), y (size, …), each example once, shuffled by `generator`; the last may be short."""
        for rows in self.rows(size, generator):
            yield self.x[rows], self.y[rows]

    def rows(self, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The same batches as rows (size,) of `x` and `y`."""
        index = self.index if generator is None else self.index.index_select(0, torch.randperm(len(self), generator=generator))
        return index.split(size) if len(index) else ()

    def split(self, every: int = 5) -> tuple[Examples, Examples]:
        """All but each `every`-th example, and these: always the same two parts. Fewer than `every` examples are in both."""
        if len(self) < every:
            return self, self
        held = torch.arange(len(self)) % every == every - 1
        return replace(self, index=self.index[~held]), replace(self, index=self.index[held])

    def all(self) -> tuple[Tensor, Tensor]:
        """Every example: x (len, *shape), y (len, …)."""
        return self.x[self.index], self.y[self.index]


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's examples; `train` and its own `test` never overlap, `test` may be empty."""

    train: Examples
    test: Examples
    class_counts: Tensor  # int64 (classes,): examples of each class in train

    @property
    def held_classes(self) -> Tensor:
        """Bool (classes,): the classes present in `train`."""
        return self.class_counts > 0


@dataclass(frozen=True, eq=False)
class ServerData:
    """The server's own labelled examples: `tune` to train on, `holdout` only to choose the best step."""

    tune: Examples
    holdout: Examples


@dataclass(frozen=True, eq=False)
class FederatedDataset:
    """Who holds which examples of a data set. No example is in two of the clients' parts, `public` and `test`."""

    dataset: str
    classes: tuple[str, ...]  # or, where examples have none, the groups that a partition tells apart
    clients: tuple[ClientData, ...]
    public: ServerData | None
    test: Examples
    fingerprint: str  # equal where the same clients hold the same examples
    class_counts: Tensor  # int64 (clients, classes): the clients' train examples
    inputs: Inputs  # what a model is to be built for
    model: str  # the name of the model of a run that names none
    preprocessing: dict[str, Any]  # data options that were left open, resolved: columns, mean, std …
    unused: int = 0  # training examples that the partition gives to nobody

    def on(self, device: str) -> FederatedDataset:
        """The same data set with x and y on `device`; the indices stay on CPU."""
        if torch.device(device).type == "cpu":
            return self
        moved: dict[int, Tensor] = {}

        def move(part: Examples) -> Examples:
            x, y = (moved.setdefault(id(t), t.to(device)) for t in (part.x, part.y))
            return replace(part, x=x, y=y)

        clients = tuple(replace(c, train=move(c.train), test=move(c.test)) for c in self.clients)
        public = self.public and ServerData(move(self.public.tune), move(self.public.holdout))
        return replace(self, clients=clients, public=public, test=move(self.test))

    @cached_property
    def train_sizes(self) -> list[int]:
        """How many examples each client trains on."""
        return [len(client.train) for client in self.clients]

    @cached_property
    def test_sizes(self) -> list[int]:
        """How many of its own each client is tested on."""
        return [len(client.test) for client in self.clients]

    @property
    def kind(self) -> TaskKind:
        """What the targets are."""
        return self.inputs.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return self.inputs.shape
