"""Width groups of any module: which channels go together, and a smaller module made of the units that are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hetfl.core.errors import UsageError
from hetfl.core.streams import stream
from hetfl.core.trace import Tracer, called

State = dict[str, Tensor]
Kept = Mapping[str, Tensor]
TOLERANCE = 1e-4


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
    cannot; `draws` tells whether the forward pass draws random numbers (dropout).
    """

    groups: tuple[Group, ...]
    axes: dict[str, dict[int, Axis]]
    shapes: dict[str, tuple[int, ...]]
    frozen: dict[str, str] = field(default_factory=dict)
    draws: bool = False

    def select(self, choose: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """Units kept in every group, `choose(size)` giving the unit numbers in local order."""
        return {group.name: choose(group.size) for group in self.groups}

    def prefix(self, ratio: float) -> dict[str, Tensor]:
        """The leading `ceil(ratio * size)` units of every group."""
        return self.select(lambda size: torch.arange(count(size, ratio)))

    def index(self, kept: Kept) -> dict[str, dict[int, Tensor]]:
        """For each cut tensor and dim: the positions that `kept` leaves, in local order."""
        return {name: {dim: axis.index(kept) for dim, axis in axes.items()} for name, axes in self.axes.items()}

    def elastic(self) -> float:
        """Share of the entries that some cut can remove."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        return sum(math.prod(self.shapes[name]) for name in self.axes) / max(total, 1)


def trace(model: nn.Module, *inputs: Tensor, verify: bool = True) -> Widths:
    """The width groups of `model`, found by running it once on `inputs` (a batch of two or more).

    Every group is proven: the model cut at random must compute what the full model computes with the removed entries zero
    (normalisation over channels left out of both); a group that fails is frozen. Raises UsageError where the model does not run.
    """
    mode = model.training
    model.eval()
    try:
        tracer = Tracer(model)
        with torch.no_grad():
            tracer.run(model, *inputs)
            widths = gather(tracer, model)
            return prove(widths, model, inputs) if verify else widths
    except UsageError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise UsageError(f"the model does not run on inputs of shape {shapes}: {type(error).__name__}: {error}") from error
    finally:
        model.train(mode)


def gather(tracer: Tracer, model: nn.Module) -> Widths:
    """Turns the tracer's labels into groups: units that lie in the same dims of the same tensors form one group."""
    shapes = {name: tuple(t.shape) for name, t in tensors(model).items()}
    raw = dict(tracer.axes)
    for name, labels in tracer.raw.items():
        for dim in range(labels.ndim):
            units = raw_axis(tracer, labels, dim)
            if (name, dim) in raw:
                tracer.tie(raw[name, dim], units)
            elif bool((units >= 0).any()):
                raw[name, dim] = units
    lines = {key: tracer.root(units) for key, units in raw.items()}
    reasons = {int(tracer.root(torch.tensor([unit]))): why for unit, why in tracer.reasons.items()}
    members: dict[int, dict[tuple[str, int], int]] = {}
    for key, line in lines.items():
        for unit in line.tolist():
            if unit >= 0:
                place = members.setdefault(unit, {})
                place[key] = place.get(key, 0) + 1
    alike: dict[tuple[Any, ...], list[int]] = {}
    for unit in sorted(members):
        if unit not in reasons:
            alike.setdefault(tuple(members[unit].items()), []).append(unit)
    groups: list[Group] = []
    at: dict[int, tuple[int, int]] = {}
    for signature, whole in alike.items():
        if len(whole) > 1:
            at.update({unit: (len(groups), i) for i, unit in enumerate(whole)})
            groups.append(Group(unique(signature[0][0][0], groups), len(whole)))
    frozen = {min(members[unit])[0]: why for unit, why in reasons.items() if unit in members}
    names = tuple(g.name for g in groups)
    axes: dict[str, dict[int, Axis]] = {}
    for (name, dim), line in lines.items():
        if any(unit in at for unit in line.tolist()):
            axes.setdefault(name, {})[dim] = axis(names, [at.get(unit, (-1, -1)) for unit in line.tolist()])
    return Widths(tuple(groups), axes, shapes, frozen, tracer.draws)


def raw_axis(tracer: Tracer, labels: Tensor, dim: int) -> Tensor:
    """Units of one dim of a parameter that was used raw: those that are the same along every other dim, and shared."""
    lines = tracer.root(labels).movedim(dim, 0).reshape(labels.shape[dim], -1)
    same = (lines == lines[:, :1]).all(dim=1)
    return torch.where(same, lines[:, 0], -1) if bool(same.all()) else torch.full((len(lines),), -1)


def unique(parameter: str, groups: Sequence[Group]) -> str:
    name = parameter.removesuffix(".weight")
    taken = {g.name for g in groups}
    return next(n for n in (name, *(f"{name}#{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def axis(names: tuple[str, ...], pairs: Iterable[tuple[int, int]]) -> Axis:
    group, unit = torch.tensor(list(pairs)).T.contiguous()
    return Axis(names, group, unit)


def tensors(model: nn.Module) -> State:
    """Parameters and buffers by name, those of `state_dict` (tied ones under their first name)."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = model.state_dict()
    return {name: tensor.detach() for name, tensor in named.items() if name in kept}


def prove(widths: Widths, model: nn.Module, inputs: Sequence[Tensor]) -> Widths:
    """`widths` without the groups whose cut changes what the model computes."""
    if not widths.groups or exact(widths, model, inputs, widths.groups):
        return widths
    bad = [g for g in widths.groups if not exact(widths, model, inputs, [g])]
    good = without(widths, {g.name: "a cut changes the output: its size is fixed in the code" for g in bad})
    if good.groups and not exact(good, model, inputs, good.groups):
        return without(good, {g.name: "its cut could not be proven" for g in good.groups})
    return good


def without(widths: Widths, reasons: dict[str, str]) -> Widths:
    """`widths` with the named groups frozen."""
    groups = tuple(g for g in widths.groups if g.name not in reasons)
    names = tuple(g.name for g in groups)
    axes: dict[str, dict[int, Axis]] = {}
    for name, dims in widths.axes.items():
        for dim, old in dims.items():
            to = [names.index(g) if g in names else -1 for g in old.groups] + [-1]
            pairs = [(to[g], u if to[g] >= 0 else -1) for g, u in zip(old.group.tolist(), old.unit.tolist(), strict=True)]
            if any(g >= 0 for g, _ in pairs):
                axes.setdefault(name, {})[dim] = axis(names, pairs)
    return Widths(groups, axes, widths.shapes, {**widths.frozen, **reasons}, widths.draws)


def exact(widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[Group]) -> bool:
    """Whether the model cut in `groups` computes what the full model with zeroed entries does, on random weights."""
    generator = stream(0, "prove")
    cut = {g.name for g in groups}
    kept = {
        g.name: torch.randperm(g.size, generator=generator)[: max(1, g.size // 2)] if g.name in cut else torch.arange(g.size)
        for g in widths.groups
    }
    index = widths.index(kept)
    state = {name: noise(name, t, generator) for name, t in tensors(model).items()}
    small_state = {name: take(t, index.get(name, {})) for name, t in state.items()}
    masked = {name: put(small_state[name], index.get(name, {}), torch.zeros_like(t)) for name, t in state.items()}
    try:
        small = load(build(widths, model, index), small_state)
        with Plain():
            a = torch.func.functional_call(model, masked, tuple(inputs))
            b = small(*inputs)
    except Exception:
        return False
    return all(close(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def noise(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a plausible scale, so that no zero or equal entry hides a wrong cut."""
    if not tensor.is_floating_point():
        return tensor
    fan = math.sqrt(max(1, tensor[0].numel())) if tensor.ndim > 1 else 1.0
    drawn = torch.randn(tensor.shape, generator=generator).to(tensor) / fan
    return drawn.abs() + 0.5 if name.endswith("var") else drawn


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * (1 + a.abs().max()))


def leaves(out: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


class Plain(TorchFunctionMode):
    """Leaves out what legitimately differs between a cut and a masked model: normalisation over channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = called(func)
        if name in ("layer_norm", "rms_norm", "group_norm"):
            named = ("input", "_", "weight", "bias") if name != "rms_norm" else ("input", "_", "weight")
            given = {**dict(zip(named, args, strict=False)), **kwargs}
            shape = (1, -1) + (1,) * (given["input"].ndim - 2) if name == "group_norm" else (-1,)
            weight, bias = given.get("weight"), given.get("bias")
            out = given["input"] if weight is None else given["input"] * weight.reshape(shape)
            return out if bias is None else out + bias.reshape(shape)
        if name == "scaled_dot_product_attention":
            return F.scaled_dot_product_attention(*args, **{**kwargs, "scale": 1.0})
        return func(*args, **kwargs)


# the smaller module


def take(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """The entries of `tensor` at `index` along each of its dims; a leading run of positions is a view."""
    for dim, where in index.items():
        tensor = tensor.narrow(dim, 0, len(where)) if leading(where) else tensor.index_select(dim, where)
    return tensor


def put(small: Tensor, index: Mapping[int, Tensor], like: Tensor) -> Tensor:
    """`like` with the entries at `index` replaced by `small`; the inverse of `take` there."""
    full = like.clone()
    full[cells(index, like)] = small.to(like)
    return full


def cells(index: Mapping[int, Tensor], like: Tensor) -> tuple[Any, ...]:
    """Indices that address the block `index` of a tensor of the shape of `like`, for reading or assignment."""
    if all(leading(where) for where in index.values()):
        return tuple(slice(0, len(index[d])) if d in index else slice(None) for d in range(like.ndim))
    lines = [index[d] if d in index else torch.arange(like.shape[d]) for d in range(like.ndim)]
    return torch.meshgrid(*lines, indexing="ij") if like.ndim else ()


def leading(where: Tensor) -> bool:
    return bool(len(where)) and int(where[0]) == 0 and bool((where == torch.arange(len(where))).all())


def build(widths: Widths, model: nn.Module, index: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """A copy of `model` whose tensors have the sizes that `index` leaves; its values are to be loaded.

    Layer attributes that repeat a size (features, channels, groups, normalized_shape) follow the tensors.
    """
    memo: dict[int, Any] = {}
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        small = take(tensor.detach(), index.get(name, {})).clone()
        memo[id(tensor)] = nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small
    small_model = copy.deepcopy(model, memo)
    for before, after in zip(model.modules(), small_model.modules(), strict=True):
        refit(before, after)
    return small_model


def refit(before: nn.Module, after: nn.Module) -> None:
    """Sets the size attributes of one layer to the shapes of its tensors."""
    weight = getattr(after, "weight", None)
    if isinstance(after, nn.modules.conv._ConvNd) and weight is not None:
        refit_conv(before, after)  # type: ignore[arg-type]
    elif isinstance(after, nn.Linear):
        after.out_features, after.in_features = after.weight.shape
    elif isinstance(after, nn.modules.batchnorm._NormBase) and weight is not None:
        after.num_features = len(after.weight)
    elif isinstance(after, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        after.normalized_shape = tuple(after.weight.shape)
    elif isinstance(after, nn.GroupNorm) and weight is not None:
        own = after.num_groups == after.num_channels
        after.num_channels = len(after.weight)
        after.num_groups = after.num_channels if own else after.num_groups
    elif isinstance(after, nn.Embedding):
        after.embedding_dim = after.weight.shape[1]


def refit_conv(before: nn.modules.conv._ConvNd, after: nn.modules.conv._ConvNd) -> None:
    o, i = (1, 0) if after.transposed else (0, 1)
    depthwise = before.groups > 1 and before.groups == before.in_channels
    if depthwise:
        after.groups = before.groups * after.weight.shape[0] // before.weight.shape[0]
    after.out_channels = after.weight.shape[o] * (after.groups if after.transposed else 1)
    after.in_channels = after.weight.shape[i] * (1 if after.transposed else after.groups)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copies `state` into the tensors of `model`, in place."""
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(state[name])
    return model
