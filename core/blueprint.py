"""What a node needs to build submodels without the whole model: the width groups as JSON, and a model without values."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.core.models import ZOO
from hetfl.core.widths import Axis, Group, Widths

Plain = dict[str, Any]


def drawn(widths: Widths) -> Plain:
    """`widths` as JSON can say it."""
    return {
        "groups": [[g.name, g.size] for g in widths.groups],
        "axes": {name: {str(dim): axis_of(axis) for dim, axis in dims.items()} for name, dims in widths.axes.items()},
        "shapes": {name: list(shape) for name, shape in widths.shapes.items()},
        "frozen": widths.frozen,
        "draws": widths.draws,
        "sizes": [[*place, axis_of(axis), str(share)] for place, (axis, share) in widths.sizes.items()],
    }


def read(plain: Plain) -> Widths:
    """The inverse of `drawn`."""
    return Widths(
        tuple(Group(name, size) for name, size in plain["groups"]),
        {name: {int(dim): axis_from(axis) for dim, axis in dims.items()} for name, dims in plain["axes"].items()},
        {name: tuple(shape) for name, shape in plain["shapes"].items()},
        plain["frozen"], plain["draws"],
        {(module, attribute): (axis_from(axis), Fraction(share)) for module, attribute, axis, share in plain["sizes"]},
    )  # fmt: skip


def axis_of(axis: Axis) -> Plain:
    return {"groups": list(axis.groups), "group": runs(axis.group), "unit": runs(axis.unit)}


def axis_from(plain: Plain) -> Axis:
    return Axis(tuple(plain["groups"]), spelt(plain["group"]), spelt(plain["unit"]))


def runs(numbers: Tensor) -> list[list[int]]:
    """Integers as runs: first, step, count."""
    found: list[list[int]] = []
    for n in numbers.tolist():
        if found and found[-1][2] == 1:
            found[-1][1], found[-1][2] = n - found[-1][0], 2
        elif found and n == found[-1][0] + found[-1][1] * found[-1][2]:
            found[-1][2] += 1
        else:
            found.append([n, 0, 1])
    return found


def spelt(runs: list[list[int]]) -> Tensor:
    """The inverse of `runs`."""
    return torch.tensor([first + step * i for first, step, count in runs for i in range(count)], dtype=torch.int64)


def hollow(model: nn.Module) -> bool:
    """Whether `model`, built without values, loses nothing that would not be sent: no tensors outside its state dict."""
    named = model.state_dict().keys()
    hidden = any(isinstance(v, Tensor) for m in model.modules() for v in vars(m).values())
    return not hidden and all(name in named for name, _ in model.named_buffers())


def plain_name(name: str) -> bool:
    """Whether a model's name alone says what it is: it needs no example to be built."""
    return name in ZOO


def filled(model: nn.Module) -> nn.Module:
    """A submodel with room for its values, 0 until they are loaded."""
    if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return model
    made = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.zero_()
    return made
