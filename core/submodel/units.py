"""What single units of the width groups weigh, where they are consumed, and gates on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hetfl.models.state import State
from hetfl.submodel.widths import Axis, Widths, unit_count

Units = dict[str, Tensor]  # for each group: a value for each unit

Gate = tuple[str, int]  # a tensor, and the dim along which a group's units enter it


def scores(widths: Widths, state: Mapping[str, Tensor], names: Collection[str], power: int = 2) -> Units:
    """For each unit: the sum of |w|^power over what makes it, its rows (dim 0) in the tensors `names`."""
    return {group: total for group, (total, _) in sums(widths, state, names, power).items()}


def means(widths: Widths, state: Mapping[str, Tensor], names: Collection[str], power: int = 1) -> Units:
    """As `scores`, but the mean over those entries."""
    return {group: total / entries.clamp(min=1) for group, (total, entries) in sums(widths, state, names, power).items()}


def sums(widths: Widths, state: Mapping[str, Tensor], names: Collection[str], power: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, number of entries) for each unit of each group."""
    found = {g.name: (torch.zeros(g.size), torch.zeros(g.size)) for g in widths.groups}
    for name in (n for n in names if 0 in widths.axes.get(n, {})):
        rows = state[name].abs().pow(power).reshape(len(state[name]), -1)
        for group, at, unit in members(widths.axes[name][0]):
            found[group][0].index_add_(0, unit, rows.sum(1)[at])
            found[group][1].index_add_(0, unit, torch.full((len(at),), float(rows.shape[1])))
    return found


def members(axis: Axis) -> list[tuple[str, Tensor, Tensor]]:
    """(group, its positions along the dim, their units) for each group of an axis."""
    at = [(group, (axis.group == g).nonzero().squeeze(1)) for g, group in enumerate(axis.groups)]
    return [(group, where, axis.unit[where]) for group, where in at if len(where)]


def strongest(values: Tensor, number: int) -> Tensor:
    """The `number` units of the largest values, in ascending order; of equal ones the first."""
    return values.argsort(descending=True, stable=True)[:number].sort().values


def fitting(widths: Widths, values: Mapping[str, Tensor], ratio: float) -> Units:
    """The units to keep: of each group the `ceil(ratio * size)` of the largest values."""
    return {g.name: strongest(values[g.name], unit_count(g.size, ratio)) for g in widths.groups}


def consumers(widths: Widths, model: nn.Module) -> dict[str, list[Gate]]:
    """Where each group's units are read: the input dims of weights, and the filters of depthwise convolutions."""
    weights = {name for name, p in model.named_parameters() if p.ndim > 1}
    found: dict[str, list[Gate]] = {g.name: [] for g in widths.groups}
    for name, dim in ((n, d) for n, axes in widths.axes.items() if n in weights for d in axes):
        if dim in reads(model, name):
            for group, _, _ in members(widths.axes[name][dim]):
                found[group].append((name, dim))
    return found


def reads(model: nn.Module, name: str) -> tuple[int, ...]:
    """The dims of tensor `name` along which channels enter its layer."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return ()
    if isinstance(module, nn.modules.conv._ConvNd):
        return (0,) if module.transposed or depthwise(module) else (1,)
    return (1,)


def depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


@dataclass(frozen=True, eq=False)
class Reader:
    """Where a group's gates act in one tensor of a (sub)model: `ours` are the positions along `dim`, `unit` the gate of each."""

    group: str
    name: str
    dim: int
    ours: Tensor
    unit: Tensor


def readers(widths: Widths, places: Mapping[str, list[Gate]], sizes: Mapping[str, int] | None = None) -> list[Reader]:
    """The places of gates in the whole model, or in its submodel of `sizes`."""
    kept = {g.name: torch.arange(g.size if sizes is None else sizes[g.name]) for g in widths.groups}
    found = []
    for group, (name, dim) in ((g, place) for g in places for place in places[g]):
        axis = widths.axes[name][dim]
        at = axis.index(kept)
        ours = axis.group[at] == axis.groups.index(group)
        found.append(Reader(group, name, dim, ours, torch.where(ours, axis.unit[at], 0)))
    return found


def gated(state: Mapping[str, Tensor], gates: Mapping[str, Tensor], readers: Sequence[Reader]) -> State:
    """The tensors that `readers` name with each unit's entries multiplied by its gate, as if its activations were on their way in.

    Differentiable in `gates` and `state`.
    """
    found: State = {}
    for r in readers:
        tensor = found.get(r.name, state[r.name])
        line = torch.where(r.ours, gates[r.group][r.unit], 1.0)
        found[r.name] = tensor * line.reshape([-1 if d == r.dim else 1 for d in range(tensor.ndim)])
    return found
