"""Width groups as JSON, for nodes that build submodels without tracing."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hetfl.submodel.widths import Axis, Group, Widths

Json = dict[str, Any]


def to_json(widths: Widths) -> Json:
    """`widths` as lists, dicts, numbers and strings."""
    return {
        "groups": [[g.name, g.size, g.heads] for g in widths.groups],
        "axes": {name: {str(dim): axis_to_json(axis) for dim, axis in dims.items()} for name, dims in widths.axes.items()},
        "shapes": {name: list(shape) for name, shape in widths.shapes.items()},
        "frozen": widths.frozen,
        "draws": widths.draws,
        "sizes": [[*attribute, axis_to_json(axis), str(share)] for attribute, (axis, share) in widths.sizes.items()],
    }


def from_json(plain: Json) -> Widths:
    """The inverse of `to_json`."""
    return Widths(
        tuple(Group(*group) for group in plain["groups"]),
        {name: {int(dim): axis_from_json(axis) for dim, axis in dims.items()} for name, dims in plain["axes"].items()},
        {name: tuple(shape) for name, shape in plain["shapes"].items()},
        plain["frozen"], plain["draws"],
        {(module, name): (axis_from_json(axis), Fraction(share)) for module, name, axis, share in plain["sizes"]},
    )  # fmt: skip


def axis_to_json(axis: Axis) -> Json:
    return {"groups": list(axis.groups), "group": to_runs(axis.group), "unit": to_runs(axis.unit)}


def axis_from_json(plain: Json) -> Axis:
    return Axis(tuple(plain["groups"]), from_runs(plain["group"]), from_runs(plain["unit"]))


def to_runs(numbers: Tensor) -> list[list[int]]:
    """Integers as runs [first, step, count]: 0 1 2 3 8 10 12 gives [[0, 1, 4], [8, 2, 3]]."""
    found: list[list[int]] = []
    for n in numbers.tolist():
        if found and found[-1][2] == 1:
            found[-1][1], found[-1][2] = n - found[-1][0], 2
        elif found and n == found[-1][0] + found[-1][1] * found[-1][2]:
            found[-1][2] += 1
        else:
            found.append([n, 0, 1])
    return found


def from_runs(runs: list[list[int]]) -> Tensor:
    """The inverse of `to_runs`, int64."""
    return torch.tensor([first + step * i for first, step, count in runs for i in range(count)], dtype=torch.int64)
