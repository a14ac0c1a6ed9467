"""Width groups of any module: which channels go together, and a smaller module made of the units that are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.core.blocks import Index, take
from hetfl.core.sizes import Place

State = dict[str, Tensor]
Kept = Mapping[str, Tensor]
DEPTH = "depth"  # among the sizes of a submodel: how many exits it has, where the model has several


def count(size: int, ratio: float) -> int:
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
        return self.select(lambda size: torch.arange(count(size, ratio)))

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


def tensors(model: nn.Module) -> State:
    """Parameters and buffers by name, those of `state_dict` (tied ones under their first name)."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = model.state_dict()
    return {name: tensor.detach() for name, tensor in named.items() if name in kept}


def copied(model: nn.Module) -> State:
    """The tensors of `model` as they are now, in main memory and the plain layout whatever the model's."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in tensors(model).items()}


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


# the smaller module


def within(widths: Widths, sizes: Mapping[str, int], kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Where the units `kept` (local numbers) of a submodel of `sizes` lie in that submodel's own tensors."""
    ours = {group.name: torch.arange(sizes[group.name]) for group in widths.groups}
    outer, inner = widths.index(ours), widths.index({**ours, **kept})
    return {name: {dim: torch.searchsorted(outer[name][dim], where) for dim, where in dims.items()} for name, dims in inner.items()}


def build(widths: Widths, model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of `model` whose tensors have the sizes that `kept` leaves; its values are to be loaded.

    Attributes of layers that repeat a size (features, channels, groups, normalized_shape, heads) follow.
    """
    memo: dict[int, Any] = {}
    index = widths.index(kept)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        small = take(tensor.detach(), index.get(name, {})).clone()
        memo[id(tensor)] = nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small
    small_model = copy.deepcopy(model, memo)
    present = {path for path, _ in small_model.named_modules()}
    for (path, attribute), (counted, share) in ((p, c) for p, c in widths.sizes.items() if p[0] in present):
        resize(small_model.get_submodule(path), attribute, int(len(counted.index(kept)) / share))
    for layer in small_model.modules():
        refit(layer)
    return small_model


def resize(module: nn.Module, attribute: str, size: int) -> None:
    """Sets an attribute that counts channels; one that is a shape keeps its form."""
    setattr(module, attribute, (size,) if isinstance(getattr(module, attribute, None), tuple) else size)


def refit(layer: nn.Module) -> None:
    """Sets the size attributes of one of torch's layers to the shapes of its tensors."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.modules.conv._ConvNd):
        refit_conv(layer)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase) and weight is not None:
        layer.num_features = len(weight)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.GroupNorm) and weight is not None:
        layer.num_channels = len(weight)
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, nn.RNNBase):
        layer.input_size = int(layer.get_parameter("weight_ih_l0").shape[1])
    elif isinstance(layer, nn.RNNCellBase):
        layer.input_size = int(layer.get_parameter("weight_ih").shape[1])


def refit_conv(layer: nn.modules.conv._ConvNd) -> None:
    o, i = (1, 0) if layer.transposed else (0, 1)
    layer.out_channels = layer.weight.shape[o] * (layer.groups if layer.transposed else 1)
    layer.in_channels = layer.weight.shape[i] * (1 if layer.transposed else layer.groups)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copies `state` into the tensors of `model`, in place."""
    mine = tensors(model)
    with torch.no_grad():
        torch._foreach_copy_(list(mine.values()), [state[name] for name in mine])
    return model
