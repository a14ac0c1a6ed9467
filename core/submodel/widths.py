"""Width groups of a module: which channels go together, and where their units lie in each tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from hetfl.submodel.blocks import Index
from hetfl.submodel.tracing.sizes import Place

Kept = Mapping[str, Tensor]

DEPTH = "depth"  # among the sizes of a submodel: how many exits it has, where the model has several


def unit_count(size: int, ratio: float) -> int:
    """Units of a group of `size` that width ratio `ratio` in (0, 1] keeps: ceil, at least 1 (spec heterofl 2.1)."""
    return max(1, math.ceil(size * ratio - 1e-9))


@dataclass(frozen=True)
class Group:
    """Channels that can only be cut together, as the ordered units 0 … size - 1."""

    name: str
    size: int


@dataclass(frozen=True, eq=False)
class Axis:
    """One dim of a parameter: the group (-1: fixed) and the unit of each of its positions."""

    groups: tuple[str, ...]
    group: Tensor
    unit: Tensor

    @cached_property
    def turn(self) -> Tensor:
        """How many earlier positions bear the same unit."""
        seen: dict[tuple[int, int], int] = {}
        turns = []
        for key in zip(self.group.tolist(), self.unit.tolist(), strict=True):
            turns.append(seen.get(key, 0))
            seen[key] = turns[-1] + 1
        return torch.tensor(turns)

    @cached_property
    def places(self) -> dict[int, Tensor]:
        """For each group: positions of its units, (units, occurrences)."""
        return {g: self._places(g) for g in self.group.unique().tolist() if g >= 0}

    def _places(self, group: int) -> Tensor:
        where = (self.group == group).nonzero().squeeze(1)
        order = self.unit[where].argsort(stable=True)
        return where[order].reshape(int(self.unit[where].max()) + 1, -1)

    def index(self, kept: Kept) -> Tensor:
        """Positions that remain, in the order in which the smaller module holds them.

        The smaller module lays its units out as this one lays out its first ones, so the positions are those of a prefix,
        with the kept units put in the places of the first.
        """
        limits = torch.tensor([*(len(kept[name]) for name in self.groups), len(self.group) + 1])
        prefix = ((self.unit < limits[self.group]) | (self.group < 0)).nonzero().squeeze(1)
        index = prefix.clone()
        for g, places in self.places.items():
            ours = self.group[prefix] == g
            index[ours] = places[kept[self.groups[g]][self.unit[prefix[ours]]], self.turn[prefix[ours]]]
        return index


@dataclass(frozen=True, eq=False)
class Widths:
    """The width groups of a module, from `trace`.

    `axes` maps a parameter's or buffer's name to an Axis for each dim that can be cut; `frozen` says why a layer's channels
    cannot; `draws` tells whether the forward pass draws random numbers (dropout); `sizes` are the attributes of modules that
    count channels: (module, attribute) to the channels and the share of their number that the attribute is.
    """

    groups: tuple[Group, ...]
    axes: dict[str, dict[int, Axis]]
    shapes: dict[str, tuple[int, ...]]
    frozen: dict[str, str] = field(default_factory=dict)
    draws: bool = False
    sizes: dict[Place, tuple[Axis, Fraction]] = field(default_factory=dict)

    def select(self, choose: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """Units kept in every group, `choose(size)` giving the unit numbers in local order."""
        return {group.name: choose(group.size) for group in self.groups}

    def prefix(self, ratio: float) -> dict[str, Tensor]:
        """The leading `ceil(ratio * size)` units of every group."""
        return self.select(lambda size: torch.arange(unit_count(size, ratio)))

    def index(self, kept: Kept) -> dict[str, Index]:
        """For each cut tensor: the positions along its dims that `kept` leaves, in local order."""
        return {name: Index({dim: axis.index(kept) for dim, axis in axes.items()}) for name, axes in self.axes.items()}

    def elastic(self) -> float:
        """Share of the entries that some cut can remove."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        return sum(math.prod(self.shapes[name]) for name in self.axes if name in self.shapes) / max(total, 1)


def axis(names: tuple[str, ...], pairs: Iterable[tuple[int, int]]) -> Axis:
    group, unit = torch.tensor(list(pairs)).T.contiguous()
    return Axis(names, group, unit)


def without(widths: Widths, reasons: dict[str, str]) -> Widths:
    """`widths` with the named groups frozen."""
    if not reasons:
        return widths
    groups = tuple(g for g in widths.groups if g.name not in reasons)
    names = tuple(g.name for g in groups)
    axes: dict[str, dict[int, Axis]] = {}
    for name, dims in widths.axes.items():
        for dim, old in dims.items():
            if (new := narrowed(old, names)) is not None:
                axes.setdefault(name, {})[dim] = new
    sizes = {place: (new, share) for place, (old, share) in widths.sizes.items() if (new := narrowed(old, names)) is not None}
    return replace(widths, groups=groups, axes=axes, frozen={**widths.frozen, **reasons}, sizes=sizes)


def narrowed(old: Axis, names: tuple[str, ...]) -> Axis | None:
    """`old` with the groups `names` only; None where it has none of them."""
    to = [names.index(g) if g in names else -1 for g in old.groups] + [-1]
    pairs = [(to[g], u if to[g] >= 0 else -1) for g, u in zip(old.group.tolist(), old.unit.tolist(), strict=True)]
    return axis(names, pairs) if any(g >= 0 for g, _ in pairs) else None


def within(widths: Widths, sizes: Mapping[str, int], kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Where the units `kept` (local numbers) of a submodel of `sizes` lie in that submodel's own tensors."""
    ours = {group.name: torch.arange(sizes[group.name]) for group in widths.groups}
    outer, inner = widths.index(ours), widths.index({**ours, **kept})
    return {name: {dim: torch.searchsorted(outer[name][dim], where) for dim, where in dims.items()} for name, dims in inner.items()}
