"""How a client's parameters lie inside the global ones: what travels down (`take`) and where it belongs (`put`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hetfl.core.widths import Kept, State, Widths, cells, count, take

Index = Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class Patch:
    """What one client says of one tensor: `values` for the block of the global tensor at `index` (dim -> positions).

    `coverage` (shape of `values`) says how much each entry counts; None means 1 everywhere. Outside the block it is 0.
    """

    values: Tensor
    index: Index = field(default_factory=dict)
    coverage: Tensor | None = None

    def full(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Values and coverage in the shape of `like`; uncovered entries show `like` and coverage 0."""
        values, coverage = like.clone(), torch.zeros(like.shape)
        where = cells(self.index, like)
        values[where] = self.values.to(like)
        coverage[where] = 1.0 if self.coverage is None else self.coverage
        return values, coverage

    def rows(self, keep: Tensor) -> Patch:
        """This patch without the rows (dim 0) where `keep`, a bool for each global row, is False."""
        rows = self.index.get(0, torch.arange(len(keep)))
        ours = keep[rows].nonzero().squeeze(1)
        coverage = None if self.coverage is None else self.coverage[ours]
        return Patch(self.values[ours], {**self.index, 0: rows[ours]}, coverage)


Patches = Mapping[str, Patch]


class Plan(Protocol):
    """One client's submodel. A plan serves as long as the server's state keeps its shapes."""

    @property
    def sizes(self) -> dict[str, int]:
        """Units kept in each width group: all that a node needs to build the submodel."""

    @property
    def extras(self) -> State:
        """Named tensors that travel down beside the weights."""

    def take(self, state: State) -> State:
        """What the client gets of the global `state`."""

    def put(self, trained: State) -> Patches:
        """What `trained`, the client's tensors, says of the global ones."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The submodel of the units in `kept` (group -> unit numbers in local order): HeteroFL's slice, FedRolex's window."""

    widths: Widths
    kept: Kept
    extras: State = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(units) for name, units in self.kept.items()}

    @cached_property
    def index(self) -> dict[str, dict[int, Tensor]]:
        return self.widths.index(self.kept)

    def take(self, state: State) -> State:
        return {name: take(tensor, self.index.get(name, {})) for name, tensor in state.items()}

    def put(self, trained: State) -> dict[str, Patch]:
        return {name: Patch(values, self.index.get(name, {})) for name, values in trained.items()}


def grow(patches: Patches, like: State) -> tuple[State, State]:
    """Patches at full size: (state, coverage), with the entries of `like` where nothing is covered."""
    full = {name: patches[name].full(tensor) for name, tensor in like.items()}
    return {name: values for name, (values, _) in full.items()}, {name: cover for name, (_, cover) in full.items()}


def prefix(ratio: float) -> Callable[[int], Tensor]:
    """The first `ceil(ratio * size)` units, for `Server.select` (spec heterofl 2.1)."""
    return lambda size: torch.arange(count(size, ratio))


def window(ratio: float, start: int) -> Callable[[int], Tensor]:
    """`ceil(ratio * size)` units from `start` on, wrapping around, for `Server.select` (spec fedrolex 2.1)."""
    return lambda size: (start + torch.arange(count(size, ratio))) % size
