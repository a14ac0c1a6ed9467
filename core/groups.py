"""Finds the width groups of any module, and proves them: what is cut must compute what the masked full model does."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hetfl.core.blocks import put, take
from hetfl.core.errors import UsageError
from hetfl.core.labels import called
from hetfl.core.sizes import Place
from hetfl.core.streams import stream
from hetfl.core.trace import Heads, Tracer
from hetfl.core.widths import Axis, Group, Kept, Widths, axis, build, load, tensors, without

TOLERANCE = 1e-4


def trace(model: nn.Module, *inputs: Tensor, verify: bool = True, heads: Heads = "width") -> Widths:
    """The width groups of `model`, found by running it on `inputs` (a batch of two or more), in evaluation and training mode.

    Every group is proven: the model cut at random must compute what the full model computes with the removed entries zero
    (normalisation over channels left out of both); a group that fails is frozen. `heads` says what is cut of attention: the
    width of every head or whole heads. The model and torch's random state are left as they were.
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


Key = tuple[str, int]  # a tensor's name and one of its dims
Places = dict[int, dict[Key, int]]  # for each unit: how often it occurs where


def gather(tracer: Tracer, model: nn.Module) -> Widths:
    """Turns the tracer's labels into groups: units that lie in the same dims of the same tensors form one group."""
    shapes = {name: tuple(t.shape) for name, t in tensors(model).items()}
    lines = settled(tracer, model, shapes)
    members, reasons = occurrences(lines), frozen_units(tracer)
    groups, at = grouped({unit: places for unit, places in members.items() if unit not in reasons}, tracer.raw.keys())
    names = tuple(g.name for g in groups)

    def counted(line: Tensor) -> Axis | None:
        pairs = [at.get(unit, (-1, -1)) for unit in line.tolist()]
        return axis(names, pairs) if any(group >= 0 for group, _ in pairs) else None

    axes: dict[str, dict[int, Axis]] = {}
    for (name, dim), line in lines.items():
        if (found := counted(line)) is not None:
            axes.setdefault(name, {})[dim] = found
    claims = {place: (counted(tracer.root(units)), share) for place, units, share in reversed(tracer.claims)}
    sizes = {place: (found, share) for place, (found, share) in claims.items() if found is not None}
    frozen = {min(members[unit])[0]: why for unit, why in reasons.items() if unit in members}
    return Widths(tuple(groups), axes, shapes, frozen, tracer.draws, sizes)


def settled(tracer: Tracer, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[Key, Tensor]:
    """The units of every dim of every tensor, after all that ties and freezes them."""
    lines = dict(tracer.axes)
    for name, labels in tracer.raw.items():
        for dim in range(labels.ndim):
            units = raw_axis(tracer, labels, dim)
            if (name, dim) in lines:
                tracer.tie(lines[name, dim], units)
            elif bool((units >= 0).any()):
                lines[name, dim] = units
    for name, dim in [key for key in lines if key[0] not in shapes]:
        refuse_unsent(tracer, model.get_buffer(name), dim, lines[name, dim])
    agree(tracer)
    return {key: tracer.root(units) for key, units in lines.items()}


def occurrences(lines: Mapping[Key, Tensor]) -> Places:
    found: Places = {}
    for key, line in lines.items():
        for unit in line.tolist():
            if unit >= 0:
                place = found.setdefault(unit, {})
                place[key] = place.get(key, 0) + 1
    return found


def frozen_units(tracer: Tracer) -> dict[int, str]:
    """Why a unit cannot be cut, for those that cannot."""
    reasons: dict[int, str] = {}
    for units, why in tracer.frozen:
        for unit in tracer.root(units).unique().tolist():
            reasons.setdefault(unit, why)
    return reasons


def grouped(members: Places, raw: Collection[str]) -> tuple[list[Group], dict[int, tuple[int, int]]]:
    """The groups, and (group, unit) for each of the tracer's units; a raw table that nothing else depends on is no group."""
    alike: dict[tuple[tuple[Key, int], ...], list[int]] = {}
    for unit in sorted(members):
        alike.setdefault(tuple(members[unit].items()), []).append(unit)
    groups: list[Group] = []
    at: dict[int, tuple[int, int]] = {}
    for signature, whole in alike.items():
        named = {name for (name, _), _ in signature}
        if len(whole) > 1 and not (len(named) == 1 and named <= set(raw)):
            at.update({unit: (len(groups), i) for i, unit in enumerate(whole)})
            groups.append(Group(unique(signature[0][0][0], groups), len(whole)))
    return groups, at


def agree(tracer: Tracer) -> None:
    """What one attribute counts must be cut alike everywhere."""
    first: dict[Place, tuple[Tensor, Fraction]] = {}
    for place, units, share in tracer.claims:
        ours, other = first.setdefault(place, (units, share))
        if len(ours) == len(units) and share == other:
            tracer.tie(ours, units)
        else:
            tracer.freeze(units, f"'{place[1]}' counts other channels too")


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


def exact(widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[Group]) -> bool:
    """Whether `model` can be cut in `groups`, twice at random, and also trains so."""
    return all(holds(widths, model, inputs, {g.name for g in groups}, stream(0, "prove", draw)) for draw in range(2))


def holds(widths: Widths, model: nn.Module, inputs: Sequence[Tensor], cut: set[str], generator: torch.Generator) -> bool:
    kept = {g.name: chosen(g.size, generator) if g.name in cut else torch.arange(g.size) for g in widths.groups}
    try:
        small, error = compared(widths, model, inputs, kept, generator)
        small.train()(*inputs)
    except Exception:
        return False
    return error <= TOLERANCE


def chosen(size: int, generator: torch.Generator) -> Tensor:
    """Between 2 (a single one would broadcast) and all but one of `size` units, in random order."""
    fewest = min(2, size - 1)
    count = int(torch.randint(fewest, max(size, fewest + 1), (1,), generator=generator))
    return torch.randperm(size, generator=generator)[:count]


def compared(
    widths: Widths, model: nn.Module, inputs: Sequence[Tensor], kept: Kept, generator: torch.Generator
) -> tuple[nn.Module, float]:
    """The model cut to `kept`, and by how much its outputs differ from those of the full one with the other entries zero.

    The weights are random; the difference is relative to 1 + the largest output. Normalisation over channels is left out.
    """
    index = widths.index(kept)
    state = {name: noise(name, t, generator) for name, t in tensors(model).items()}
    small_state = {name: take(t, index.get(name, {})) for name, t in state.items()}
    masked = {name: put(small_state[name], index.get(name, {}), torch.zeros_like(t)) for name, t in state.items()}
    small = load(build(widths, model, kept), small_state).eval()
    with Plain(), torch.no_grad():
        whole = leaves(torch.func.functional_call(model.eval(), masked, tuple(inputs)))
        ours = leaves(small(*inputs))
    return small, max((difference(a, b) for a, b in zip(whole, ours, strict=True)), default=math.inf)


def difference(a: Tensor, b: Tensor) -> float:
    error = float((a - b).abs().max() / (1 + a.abs().max())) if a.shape == b.shape else math.inf
    return error if error == error else math.inf


def noise(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a plausible scale, so that no zero or equal entry hides a wrong cut."""
    if not tensor.is_floating_point():
        return tensor
    fan = math.sqrt(max(1, tensor[0].numel())) if tensor.ndim > 1 else 1.0
    drawn = torch.randn(tensor.shape, generator=generator).to(tensor) / fan
    return drawn.abs() + 0.5 if name.endswith("var") else drawn


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
