"""Width groups of any module: which channels go together, and a smaller module made of the units that are kept."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hetfl.core.errors import UsageError
from hetfl.core.labels import called
from hetfl.core.sizes import Place
from hetfl.core.streams import stream
from hetfl.core.trace import Heads, Tracer

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

    def index(self, kept: Kept) -> dict[str, dict[int, Tensor]]:
        """For each cut tensor and dim: the positions that `kept` leaves, in local order."""
        return {name: {dim: axis.index(kept) for dim, axis in axes.items()} for name, axes in self.axes.items()}

    def elastic(self) -> float:
        """Share of the entries that some cut can remove."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        return sum(math.prod(self.shapes[name]) for name in self.axes if name in self.shapes) / max(total, 1)


def trace(model: nn.Module, *inputs: Tensor, verify: bool = True, heads: Heads = "width") -> Widths:
    """The width groups of `model`, found by running it on `inputs` (a batch of two or more), in evaluation and training mode.

    Every group is proven: the model cut at random must compute what the full model computes with the removed entries zero
    (normalisation over channels left out of both); a group that fails is frozen. `heads` says what is cut of attention: the
    width of every head (HeteroFL's reading) or whole heads. The model and torch's random state are left as they were.
    Raises UsageError where the model does not run.
    """
    mode, before = model.training, {name: t.clone() for name, t in model.named_buffers()}
    try:
        tracer = Tracer(model, heads)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for training in (False, True):
                tracer.run(model.train(training), *inputs)
                restore(model, before)
            refuse_branches(tracer, model)
            model.eval()
            widths = gather(tracer, model)
            return prove(widths, model, inputs) if verify else widths
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(refusal(model, inputs, error)) from error
    finally:
        restore(model, before)
        model.train(mode)


def refuse_branches(tracer: Tracer, model: nn.Module) -> None:
    """A path that was not taken cannot be traced, so its parameters must not exist."""
    missed = [name for name, p in model.named_parameters() if id(p) not in tracer.reached]
    if tracer.branches and missed:
        raise UsageError(
            f"the forward pass of '{tracer.branches[0] or type(model).__name__}' branches on the values of tensors, and "
            f"'{missed[0]}' lies on a path that was not taken: compute both paths and choose with torch.where"
        )


def restore(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Puts the values of buffers back, in place."""
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            tensor.copy_(buffers[name])


def refusal(model: nn.Module, inputs: Sequence[Tensor], error: Exception) -> str:
    """Why a model that raised cannot be used, and what to do."""
    needed = [
        p.name for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]  # fmt: skip
    if len(needed) > len(inputs):
        return (
            f"the model's forward needs {len(needed)} inputs ({', '.join(needed)}) but gets only the examples: wrap it in a "
            "module whose forward takes one tensor and returns the logits"
        )
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    said = str(error).strip().splitlines() or ["no message"]
    return f"the model does not run on inputs of shape {shapes}: {type(error).__name__}: {said[0]}"


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
    for name, dim in [key for key in raw if key[0] not in shapes]:
        refuse_unsent(tracer, model.get_buffer(name), dim, raw[name, dim])
    lines = {key: tracer.root(units) for key, units in raw.items()}
    counts = {place: (tracer.root(units), share) for place, units, share in reversed(tracer.claims)}
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
        alone = {name for (name, _), _ in signature}
        if len(whole) > 1 and not (len(alone) == 1 and alone <= tracer.raw.keys()):  # a table that is looked up
            at.update({unit: (len(groups), i) for i, unit in enumerate(whole)})
            groups.append(Group(unique(signature[0][0][0], groups), len(whole)))
    frozen = {min(members[unit])[0]: why for unit, why in reasons.items() if unit in members}
    names = tuple(g.name for g in groups)
    axes: dict[str, dict[int, Axis]] = {}
    for (name, dim), line in lines.items():
        if any(unit in at for unit in line.tolist()):
            axes.setdefault(name, {})[dim] = axis(names, [at.get(unit, (-1, -1)) for unit in line.tolist()])
    sizes = {
        place: (axis(names, [at.get(unit, (-1, -1)) for unit in line.tolist()]), share)
        for place, (line, share) in counts.items()
        if any(unit in at for unit in line.tolist())
    }
    return Widths(tuple(groups), axes, shapes, frozen, tracer.draws, sizes)


def refuse_unsent(tracer: Tracer, buffer: Tensor, dim: int, units: Tensor) -> None:
    """A buffer outside the state cannot follow other channels than the first, unless it is the same for all."""
    if not torch.equal(buffer, buffer.narrow(dim, 0, 1).expand_as(buffer)):
        tracer.freeze(units, "a buffer that is not part of the state")


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
    """`widths` without the groups whose cut changes what the model computes, or keeps it from running."""
    sure = {g.name for g in provable(widths, model, inputs, widths.groups, ())}
    reason = "a cut changes the output: its size is fixed in the code"
    return without(widths, {g.name: reason for g in widths.groups if g.name not in sure})


def provable(
    widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[Group], sure: Sequence[Group]
) -> Sequence[Group]:
    """`sure`, groups that can be cut together, and as many of `groups` as can be cut with them, found by halving."""
    if not groups or exact(widths, model, inputs, [*sure, *groups]):
        return [*sure, *groups]
    if len(groups) == 1:
        return sure
    half = len(groups) // 2
    return provable(widths, model, inputs, groups[half:], provable(widths, model, inputs, groups[:half], sure))


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
        small = load(build(widths, model, kept), small_state).eval()
        with Plain():
            a = torch.func.functional_call(model, masked, tuple(inputs))
            b = small(*inputs)
        small.train()(*inputs)
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
    """Leaves out what legitimately differs between a cut and a masked model: normalisation over channels, 1 / sqrt(head width).

    Squashing each value stands in for the normalisation, so that deep models stay in the range of floats.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = called(func)
        if name in ("layer_norm", "rms_norm", "group_norm"):
            named = ("input", "_", "weight", "bias") if name != "rms_norm" else ("input", "_", "weight")
            given = {**dict(zip(named, args, strict=False)), **kwargs}
            shape = (1, -1) + (1,) * (given["input"].ndim - 2) if name == "group_norm" else (-1,)
            weight, bias = given.get("weight"), given.get("bias")
            out = F.softsign(given["input"])
            out = out if weight is None else out * weight.reshape(shape)
            return out if bias is None else out + bias.reshape(shape)
        if name == "scaled_dot_product_attention":
            return F.scaled_dot_product_attention(*args, **{**kwargs, "scale": 1.0})
        if name == "multi_head_attention_forward":
            return func(*unscaled(list(args)), **kwargs)
        return func(*args, **kwargs)


def unscaled(args: list[Any]) -> list[Any]:
    """The arguments of multi_head_attention_forward with queries that make up for the 1 / sqrt(width) of a head."""
    size, heads, packed, bias = args[3:7]
    scale = math.sqrt(size / heads)
    if packed is not None:
        factor = torch.cat([torch.full((size,), scale), torch.ones(2 * size)]).to(packed)
        args[5], args[6] = packed * factor[:, None], None if bias is None else bias * factor
    return args


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
    for (path, attribute), (counted, share) in widths.sizes.items():
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
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(state[name])
    return model
