"""Width groups of a module: which channels go together, and where their units lie in each tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from hetfl.submodel.blocks import Index, is_leading

# For each group the units (kept,) that a submodel keeps, in its own order; or (kept, heads), where its heads keep different units:
# number head * size + unit is the unit of that head.
Kept = Mapping[str, Tensor]

Attribute = tuple[str, str]  # a module's name and one of its attributes


def unit_count(size: int, ratio: float) -> int:
    """Units of a group of `size` that width ratio `ratio` in (0, 1] keeps: ceil, at least 1 (spec heterofl 2.1)."""
    return max(1, math.ceil(size * ratio - 1e-9))


def prefix(ratio: float) -> Callable[[int], Tensor]:
    """For `Server.select`: of a group of `size` the first `ceil(ratio * size)` units (spec heterofl 2.1)."""
    return lambda size: torch.arange(unit_count(size, ratio))


@dataclass(frozen=True)
class Group:
    """Channels that can only be cut together, as the ordered units 0 … size - 1 (a pruning library's "dependency group").

    `heads`: how often each unit lies side by side in every tensor, where attention has it in each of its heads; else 1.
    """

    name: str
    size: int
    heads: int = 1


def window(group: Group, ratio: float, start: int) -> Tensor:
    """For `Server.select`: of the units of `group` `ceil(ratio * size)` from `start` on, wrapping around (spec fedrolex 2.1).

    In attention the roll goes on from one head to the next: all channels are rolled, and each head keeps the first of what has come
    to its place, (kept, heads). Of 2 heads of 4 rolled to 7 0 1 2 3 4 5 6, two of each are 7 0 and 3 4 (spec 2.2).
    """
    channels = (start + torch.arange(group.heads * group.size)) % (group.heads * group.size)
    kept = channels.view(group.heads, group.size)[:, : unit_count(group.size, ratio)].T
    return kept.squeeze(1) if group.heads == 1 else kept


@dataclass(frozen=True, eq=False)
class Axis:
    """One dim of a tensor: for each of its positions the group (an index into `groups`; -1: fixed) and the unit, both (size,)."""

    groups: tuple[str, ...]
    group: Tensor
    unit: Tensor

    @cached_property
    def present(self) -> frozenset[str]:
        """The groups whose units lie along this dim."""
        return frozenset(self.groups[g] for g in self.group.unique().tolist() if g >= 0)

    @cached_property
    def occurrence(self) -> Tensor:
        """For each position how many earlier ones bear the same unit, (size,)."""
        seen: dict[tuple[int, int], int] = {}
        counts = []
        for key in zip(self.group.tolist(), self.unit.tolist(), strict=True):
            counts.append(seen.get(key, 0))
            seen[key] = counts[-1] + 1
        return torch.tensor(counts)

    @cached_property
    def positions(self) -> dict[int, Tensor]:
        """For each group the positions of its units, (units, occurrences)."""
        found = {}
        for g in self.group.unique().tolist():
            if g >= 0:
                ours = (self.group == g).nonzero().squeeze(1)
                order = self.unit[ours].argsort(stable=True)
                found[g] = ours[order].reshape(int(self.unit[ours].max()) + 1, -1)
        return found

    def index(self, kept: Kept) -> Tensor:
        """Positions that remain, in the order in which the smaller tensor holds them, shape (remaining,).

        Where the smaller tensor has its unit u for the n-th time, this one's n-th position of unit kept[u] goes.

        Example: rows that hold 4 units twice (queries, keys), units 0 1 2 3 0 1 2 3, of which `kept` = [3, 1] remain. The smaller
        tensor's rows are then units 0 1 0 1, as this one's are when units 2 and 3 are left out: positions 0 1 4 5. Its unit 0 is
        unit 3 here, its unit 1 is unit 1, so the answer is 3 1 7 5. Were the halves two heads, and `kept` = [[7, 3], [0, 4]], the
        first head would have 7 0, unit 3 of the second head and 0 of the first, the second head 3 4: the answer is 7 0 3 4.
        """
        counts = torch.tensor([*(len(kept[name]) for name in self.groups), len(self.group) + 1])  # the last is for group -1
        prefix = ((self.unit < counts[self.group]) | (self.group < 0)).nonzero().squeeze(1)
        index = prefix.clone()
        for g, positions in self.positions.items():
            ours = self.group[prefix] == g
            unit, occurrence = kept[self.groups[g]][self.unit[prefix[ours]]], self.occurrence[prefix[ours]]
            if unit.ndim == 2:
                head = occurrence % unit.shape[1]
                number = unit.gather(1, head[:, None]).squeeze(1)
                unit, occurrence = number % len(positions), occurrence - head + number // len(positions)
            index[ours] = positions[unit, occurrence]
        return index


@dataclass(frozen=True, eq=False, repr=False)
class Widths:
    """The width groups of a module, from `trace`.

    `axes` maps a parameter's or buffer's name to an Axis for each dim that can be cut; `shapes` has the full shape of every tensor;
    `frozen` says why a layer's channels cannot be cut; `draws` whether the forward pass draws random numbers (dropout); `sizes` are
    the attributes of modules that count channels: attribute -> (these channels, share), with share x attribute their number.
    `reductions`: for each op of the forward pass that reduces over channels, by its number, the dims of its operand that these lie
    along; in a submodel it is over those that remain.
    """

    groups: tuple[Group, ...]
    axes: dict[str, dict[int, Axis]]
    shapes: dict[str, tuple[int, ...]]
    frozen: dict[str, str] = field(default_factory=dict)
    draws: bool = False
    sizes: dict[Attribute, tuple[Axis, Fraction]] = field(default_factory=dict)
    reductions: dict[int, list[tuple[int, Axis]]] = field(default_factory=dict)

    def select(self, choose: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """For every group the units `choose(size)`, int64 in the order of the submodel."""
        return {group.name: choose(group.size) for group in self.groups}

    def prefix(self, ratio: float) -> dict[str, Tensor]:
        """The leading `ceil(ratio * size)` units of every group."""
        return self.select(prefix(ratio))

    def index(self, kept: Kept) -> dict[str, Index]:
        """For each tensor that can be cut: dim -> the positions that `kept` leaves, in the order of the submodel."""
        return self._index(kept, frozenset())

    def _index(self, kept: Kept, whole: frozenset[str]) -> dict[str, Index]:
        """`index` without the dims along which no groups lie but those of `whole`."""
        axes = {id(axis): axis for dims in self.axes.values() for axis in dims.values() if not axis.present <= whole}
        found = {key: axis.index(kept) for key, axis in axes.items()}
        placed = {name: [(d, found[id(axis)]) for d, axis in dims.items() if id(axis) in found] for name, dims in self.axes.items()}
        return {name: Index(dims) for name, dims in placed.items()}

    def whole(self, kept: Kept) -> frozenset[str]:
        """The groups of which `kept` leaves all units in their order."""
        return frozenset(g.name for g in self.groups if len(kept[g.name]) == g.size and is_leading(kept[g.name]))

    def cuts(self, kept: Kept) -> dict[str, Index]:
        """`index` without the dims that are whole and in order."""
        return self._index(kept, self.whole(kept))

    def members(self) -> dict[str, list[str]]:
        """For each group the dims of tensors that it cuts, as NAME[DIM]."""
        found: dict[str, list[str]] = {group.name: [] for group in self.groups}
        for name, dims in self.axes.items():
            for dim, axis in dims.items():
                for group in axis.positions:
                    found[axis.groups[group]].append(f"{name}[{dim}]")
        return found

    def __repr__(self) -> str:
        number, members = len(self.groups), self.members()
        plural = ("", "it cuts") if number == 1 else ("s", "they cut")
        lines = [f"{number} width group{plural[0]}; {self.elastic():.1%} of the entries are in tensors that {plural[1]}"]
        for g in self.groups:
            more = f" and {len(members[g.name]) - 6} more" if len(members[g.name]) > 6 else ""
            lines.append(f"  {g.name}: {g.size} units in {', '.join(members[g.name][:6])}{more}")
        lines += ["not cut:", *(f"  {name}: {why}" for name, why in self.frozen.items())] if self.frozen else []
        return "\n".join(lines)

    def elastic(self) -> float:
        """The share of all entries that lie in tensors that some cut makes smaller, in [0, 1]."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        return sum(math.prod(self.shapes[name]) for name in self.axes if name in self.shapes) / max(total, 1)


def make_axis(names: tuple[str, ...], pairs: Iterable[tuple[int, int]]) -> Axis:
    """The axis whose positions are the units `pairs`: (index of the group in `names`, unit), or (-1, -1)."""
    group, unit = torch.tensor(list(pairs)).T.contiguous()
    return Axis(names, group, unit)


def freeze_groups(widths: Widths, reasons: dict[str, str]) -> Widths:
    """`widths` with the named groups frozen."""
    if not reasons:
        return widths
    groups = tuple(g for g in widths.groups if g.name not in reasons)
    names, known = tuple(g.name for g in groups), dict[int, Axis | None]()

    def narrow(old: Axis) -> Axis | None:
        if id(old) not in known:
            known[id(old)] = narrow_axis(old, names)
        return known[id(old)]

    axes: dict[str, dict[int, Axis]] = {}
    for name, dims in widths.axes.items():
        for dim, old in dims.items():
            if (new := narrow(old)) is not None:
                axes.setdefault(name, {})[dim] = new
    sizes = {attribute: (new, share) for attribute, (old, share) in widths.sizes.items() if (new := narrow(old)) is not None}
    reductions = {
        op: [(dim, new) for dim, old in dims if (new := narrow(old)) is not None] for op, dims in widths.reductions.items()
    }
    return replace(widths, groups=groups, axes=axes, frozen={**widths.frozen, **reasons}, sizes=sizes, reductions=reductions)


def narrow_axis(old: Axis, names: tuple[str, ...]) -> Axis | None:
    """`old` with the groups `names` only; None where it has none of them."""
    to = [names.index(g) if g in names else -1 for g in old.groups] + [-1]
    pairs = [(to[g], u if to[g] >= 0 else -1) for g, u in zip(old.group.tolist(), old.unit.tolist(), strict=True)]
    return make_axis(names, pairs) if any(g >= 0 for g, _ in pairs) else None


def within(widths: Widths, sizes: Mapping[str, int], kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Tensor -> dim -> positions in the tensors of a submodel of `sizes` at which its units `kept` (its own numbers) lie."""
    ours = {group.name: torch.arange(sizes[group.name]) for group in widths.groups}
    outer, inner = widths.index(ours), widths.index({**ours, **kept})
    return {name: {dim: torch.searchsorted(outer[name][dim], where) for dim, where in dims.items()} for name, dims in inner.items()}
