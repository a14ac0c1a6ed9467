"""A client's part of the global model: what travels down to it (`take`) and where its tensors belong (`put`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hetfl.models.state import State, apply_masks
from hetfl.submodel.blocks import Index, cells, take_blocks
from hetfl.submodel.depth import Depth
from hetfl.submodel.widths import Kept, Widths, within

WHOLE = Index()  # the index of a tensor that is not cut


@dataclass(frozen=True, eq=False)
class Patch:
    """One client's values for one global tensor: `values` for its block at `index` (dim -> positions; a dim not there is whole).

    `coverage` (shape of `values`) is the weight of each entry in means; None means 1 everywhere. Outside the block it is 0.
    """

    values: Tensor
    index: Mapping[int, Tensor] = field(default_factory=Index)
    coverage: Tensor | None = None

    def full(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(values, coverage) in the shape of `like`, the global tensor; where nothing is covered, its values and coverage 0."""
        values, coverage = like.clone(), torch.zeros(like.shape)
        block = cells(self.index, like)
        weight = torch.ones(()) if self.coverage is None else self.coverage.to(coverage)
        values[block] = torch.where(weight > 0, self.values.to(like), like[block])
        coverage[block] = weight
        return values, coverage

    def rows(self, keep: Tensor) -> Patch:
        """This patch without the rows (dim 0) for which `keep`, bool (global rows,), is False."""
        rows = self.index.get(0, torch.arange(len(keep)))
        ours = keep[rows].nonzero().squeeze(1)
        coverage = None if self.coverage is None else self.coverage[ours]
        return Patch(self.values[ours], {**self.index, 0: rows[ours]}, coverage)


Patches = Mapping[str, Patch]


class Plan(Protocol):
    """One client's submodel. A plan is valid as long as the server's tensors keep their shapes."""

    @property
    def model(self) -> str | None:
        """The name of the client's own architecture; None: it trains a part of the run's model."""

    @property
    def sizes(self) -> dict[str, int]:
        """The number of units kept in each width group: all that a node needs to build the submodel."""

    @property
    def masks(self) -> State:
        """For each pruned tensor which entries exist, bool in the shape that travels; one without a mask is dense."""

    def take(self, state: State) -> State:
        """The tensors of the submodel, cut out of the global `state`; they may be views of it."""

    def put(self, trained: State) -> Patches:
        """For each of `trained`, the submodel's tensors, the patch of the global tensor that it is."""

    def narrow(self, kept: Kept, masks: State) -> Plan:
        """The plan of a client that pruned what it was sent to the units `kept` (numbered as in its submodel) and to `masks`."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The submodel of the units in `kept` (group -> unit numbers in the submodel's order): a prefix, a window, any set of them.

    `masks` (bool, in the submodel's shapes) are the entries that exist. `depth` says which layers it leaves out, and `names` which
    tensors it then has (None: all).
    """

    widths: Widths
    kept: Kept
    masks: State = field(default_factory=dict)
    names: frozenset[str] | None = None
    depth: Depth = field(default_factory=Depth)
    model: str | None = None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Units kept in each group, and what says the depth."""
        return {name: len(units) for name, units in self.kept.items()} | self.depth.sizes

    @cached_property
    def index(self) -> dict[str, Index]:
        """For each tensor that can be cut: dim -> the global positions that the submodel has, in its order."""
        return self.widths.index(self.kept)

    @cached_property
    def cuts(self) -> dict[str, Index]:
        """`index` without the dims that are whole and in order."""
        return self.widths.cuts(self.kept)

    @cached_property
    def whole(self) -> bool:
        """Whether this is the global model itself, every unit in its own place."""
        plain = not self.masks and self.names is None and self.model is None
        return plain and len(self.widths.whole(self.kept)) == len(self.widths.groups)

    def take(self, state: State) -> State:
        mine = state if self.names is None else {name: t for name, t in state.items() if name in self.names}
        blocks = take_blocks(mine, self.cuts)
        return apply_masks(blocks, self.masks) if self.masks else blocks

    def put(self, trained: State) -> dict[str, Patch]:
        return {name: Patch(values, self.cuts.get(name, WHOLE), self.masks.get(name)) for name, values in trained.items()}

    def narrow(self, kept: Kept, masks: State) -> Selection:
        units = {name: units[kept[name]] if name in kept else units for name, units in self.kept.items()}
        inner = within(self.widths, self.sizes, kept) if kept else {}
        return replace(self, kept=units, masks={**take_blocks(self.masks, inner), **masks})


@dataclass(frozen=True, eq=False)
class OwnModel:
    """A client's own architecture `model`, which shares no tensors with the global one; `initial` are its tensors before training.

    In the server's state tensor NAME of the architecture is `MODEL:NAME`.
    """

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
    """Patches at full size: (state, coverage), both in the shapes of `like`, with its entries where coverage is 0.

    A tensor that `like` does not have (of an own architecture) is whole by itself.
    """
    absent = {name: (tensor, torch.zeros(tensor.shape)) for name, tensor in like.items() if name not in patches}
    full = absent | {name: patch.full(like.get(name, patch.values)) for name, patch in patches.items()}
    order = dict.fromkeys([*like, *full])
    return {name: full[name][0] for name in order}, {name: full[name][1] for name in order}
