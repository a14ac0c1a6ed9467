"""How a client's parameters lie inside the global ones: what travels down (`take`) and where it belongs (`put`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hetfl.models.state import State
from hetfl.submodel.blocks import Index, cells, leading, take
from hetfl.submodel.widths import DEPTH, Kept, Widths, unit_count, within

WHOLE = Index()  # of a tensor that is not cut


@dataclass(frozen=True, eq=False)
class Patch:
    """What one client says of one tensor: `values` for the block of the global tensor at `index` (dim -> positions).

    `coverage` (shape of `values`) says how much each entry counts; None means 1 everywhere. Outside the block it is 0.
    """

    values: Tensor
    index: Mapping[int, Tensor] = field(default_factory=Index)
    coverage: Tensor | None = None

    def full(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Values and coverage in the shape of `like`; uncovered entries show `like` and coverage 0."""
        values, coverage = like.clone(), torch.zeros(like.shape)
        where = cells(self.index, like)
        there = torch.ones(()) if self.coverage is None else self.coverage.to(coverage)
        values[where] = torch.where(there > 0, self.values.to(like), like[where])
        coverage[where] = there
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
    def model(self) -> str | None:
        """The client's own architecture by its name; None: it trains a part of the run's model."""

    @property
    def sizes(self) -> dict[str, int]:
        """Units kept in each width group: all that a node needs to build the submodel."""

    @property
    def masks(self) -> State:
        """Bool tensors in the shapes of what travels: the entries that exist; a tensor without a mask is dense."""

    def take(self, state: State) -> State:
        """What the client gets of the global `state`."""

    def put(self, trained: State) -> Patches:
        """What `trained`, the client's tensors, says of the global ones."""

    def narrow(self, kept: Kept, masks: State) -> Plan:
        """The plan of a client that went on to keep only `kept` (local unit numbers) and `masks` of what it was sent."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The submodel of the units in `kept` (group -> unit numbers in local order): a slice, a window, any set of them.

    `masks` (bool, shaped like the slices) are the entries that exist. `names`: the tensors that it has, all
    by default; `depth`: the exits that it has, where the model has several.
    """

    widths: Widths
    kept: Kept
    masks: State = field(default_factory=dict)
    names: frozenset[str] | None = None
    depth: int | None = None
    model: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        depth = {} if self.depth is None else {DEPTH: self.depth}
        return {name: len(units) for name, units in self.kept.items()} | depth

    @cached_property
    def index(self) -> dict[str, Index]:
        return self.widths.index(self.kept)

    @cached_property
    def places(self) -> dict[str, Index]:
        """`index` without the dims that are whole."""
        return {name: self._cut(name, index) for name, index in self.index.items()}

    def _cut(self, name: str, index: Index) -> Index:
        sides = self.widths.shapes.get(name)
        return index if sides is None else Index({d: w for d, w in index.items() if len(w) < sides[d] or not leading(w)})

    def take(self, state: State) -> State:
        mine = {
            name: take(t, self.places.get(name, WHOLE)) for name, t in state.items() if self.names is None or name in self.names
        }
        return {name: t * self.masks[name] if name in self.masks else t for name, t in mine.items()}

    def put(self, trained: State) -> dict[str, Patch]:
        return {name: Patch(values, self.places.get(name, WHOLE), self.masks.get(name)) for name, values in trained.items()}

    def narrow(self, kept: Kept, masks: State) -> Selection:
        units = {name: units[kept[name]] if name in kept else units for name, units in self.kept.items()}
        inner = within(self.widths, self.sizes, kept) if kept else {}
        old = {name: take(mask, inner.get(name, {})) for name, mask in self.masks.items()}
        return replace(self, kept=units, masks={**old, **masks})


def is_whole(selection: Selection) -> bool:
    """Whether a selection is the global model itself, unit by unit."""
    cut = any(len(selection.kept[g.name]) < g.size for g in selection.widths.groups)
    plain = not selection.masks and selection.names is None and selection.depth is None and selection.model is None
    return plain and not cut and all(leading(units) for units in selection.kept.values())


@dataclass(frozen=True, eq=False)
class OwnModel:
    """A client's own architecture `model`, which shares no coordinates with the global one; `initial` are its first tensors."""

    model: str
    initial: State
    masks: State = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return {}

    def take(self, state: State) -> State:
        return {name: state.get(f"{self.model}:{name}", tensor) for name, tensor in self.initial.items()}

    def put(self, trained: State) -> dict[str, Patch]:
        return {f"{self.model}:{name}": Patch(tensor) for name, tensor in trained.items()}

    def narrow(self, kept: Kept, masks: State) -> OwnModel:
        return replace(self, masks=masks)


def grow(patches: Patches, like: State) -> tuple[State, State]:
    """Patches at full size: (state, coverage), with the entries of `like` where nothing is covered.

    What `like` does not have (the tensors of an own architecture) is whole by itself.
    """
    absent = {name: (tensor, torch.zeros(tensor.shape)) for name, tensor in like.items() if name not in patches}
    full = absent | {name: patch.full(like.get(name, patch.values)) for name, patch in patches.items()}
    full = {name: full[name] for name in [*like, *full]}
    return {name: values for name, (values, _) in full.items()}, {name: cover for name, (_, cover) in full.items()}


def prefix(ratio: float) -> Callable[[int], Tensor]:
    """The first `ceil(ratio * size)` units, for `Server.select` (spec heterofl 2.1)."""
    return lambda size: torch.arange(unit_count(size, ratio))


def window(ratio: float, start: int) -> Callable[[int], Tensor]:
    """`ceil(ratio * size)` units from `start` on, wrapping around, for `Server.select` (spec fedrolex 2.1)."""
    return lambda size: (start + torch.arange(unit_count(size, ratio))) % size
