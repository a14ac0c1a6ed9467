"""The importance of single units of the width groups, the dims through which they are read, and gates on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hetfl.models.state import State
from hetfl.submodel.widths import Axis, Widths, unit_count

Units = dict[str, Tensor]  # for each group a value for each unit, (size,)

Gate = tuple[str, int]  # a tensor's name and the dim along which a group's units enter its layer


def sum_powers(widths: Widths, state: Mapping[str, Tensor], names: Collection[str], power: int = 2) -> Units:
    """For each unit the sum of |w|^power over the weights that compute it: its rows (dim 0) in the tensors `names`."""
    return {group: total for group, (total, _) in _sum_rows(widths, state, names, power).items()}


def mean_powers(widths: Widths, state: Mapping[str, Tensor], names: Collection[str], power: int = 1) -> Units:
    """As `sum_powers`, but the mean over those weights."""
    return {group: total / entries.clamp(min=1) for group, (total, entries) in _sum_rows(widths, state, names, power).items()}


def _sum_rows(widths: Widths, state: Mapping[str, Tensor], names: Collection[str], power: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each group (sum of |w|^power, number of weights), both (size,)."""
    found = {g.name: (torch.zeros(g.size), torch.zeros(g.size)) for g in widths.groups}
    for name in (n for n in names if 0 in widths.axes.get(n, {})):
        rows = state[name].abs().pow(power).reshape(len(state[name]), -1)
        for group, at, unit in split_by_group(widths.axes[name][0]):
            found[group][0].index_add_(0, unit, rows.sum(1)[at])
            found[group][1].index_add_(0, unit, torch.full((len(at),), float(rows.shape[1])))
    return found


def split_by_group(axis: Axis) -> list[tuple[str, Tensor, Tensor]]:
    """For each group of an axis: (group, its positions along the dim, the units there)."""
    at = [(group, (axis.group == g).nonzero().squeeze(1)) for g, group in enumerate(axis.groups)]
    return [(group, where, axis.unit[where]) for group, where in at if len(where)]


def select_largest(values: Tensor, number: int) -> Tensor:
    """The `number` units of the largest `values` (size,), in ascending order; of equal ones the first."""
    return values.argsort(descending=True, stable=True)[:number].sort().values


def select_units(widths: Widths, values: Mapping[str, Tensor], ratio: float) -> Units:
    """The units to keep: of each group the `ceil(ratio * size)` of the largest values."""
    return {g.name: select_largest(values[g.name], unit_count(g.size, ratio)) for g in widths.groups}


def find_gates(widths: Widths, model: nn.Module) -> dict[str, list[Gate]]:
    """For each group the dims through which its units are read: input dims of weights, filters of depthwise convolutions."""
    weights = {name for name, p in model.named_parameters() if p.ndim > 1}
    found: dict[str, list[Gate]] = {g.name: [] for g in widths.groups}
    for name, dim in ((n, d) for n, axes in widths.axes.items() if n in weights for d in axes):
        if dim in find_input_dims(model, name):
            for group, _, _ in split_by_group(widths.axes[name][dim]):
                found[group].append((name, dim))
    return found


def find_input_dims(model: nn.Module, name: str) -> tuple[int, ...]:
    """The dims of tensor `name` along which channels enter its layer."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return ()
    if isinstance(module, nn.modules.conv._ConvNd):
        return (0,) if module.transposed or module.groups == module.in_channels > 1 else (1,)  # transposed or depthwise
    return (1,)


@dataclass(frozen=True, eq=False)
class GatedDim:
    """Where the gates of `group` act in a (sub)model: in dim `dim` of tensor `name`, at the positions `ours`, by gate `unit`.

    `ours` (bool) and `unit` (int64) have the size of the dim.
    """

    group: str
    name: str
    dim: int
    ours: Tensor
    unit: Tensor


def locate_gates(widths: Widths, gates: Mapping[str, list[Gate]], sizes: Mapping[str, int] | None = None) -> list[GatedDim]:
    """Where the gates of `find_gates` act in the tensors of the whole model, or of its submodel of `sizes`."""
    kept = {g.name: torch.arange(g.size if sizes is None else sizes[g.name]) for g in widths.groups}
    found = []
    for group, (name, dim) in ((g, gate) for g in gates for gate in gates[g]):
        axis = widths.axes[name][dim]
        at = axis.index(kept)
        ours = axis.group[at] == axis.groups.index(group)
        found.append(GatedDim(group, name, dim, ours, torch.where(ours, axis.unit[at], 0)))
    return found


def apply_gates(state: Mapping[str, Tensor], values: Mapping[str, Tensor], dims: Sequence[GatedDim]) -> State:
    """The tensors of `dims` with each unit's entries multiplied by its gate: the same as multiplying the activations they read.

    `values` has for each group the gates (size,). Differentiable in `values` and `state`.
    """
    found: State = {}
    for g in dims:
        tensor = found.get(g.name, state[g.name])
        gates = values[g.group]
        line = torch.where(g.ours.to(gates.device), gates[g.unit], 1.0)
        found[g.name] = tensor * line.reshape([-1 if d == g.dim else 1 for d in range(tensor.ndim)])
    return found
