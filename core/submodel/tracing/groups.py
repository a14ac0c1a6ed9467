"""Finds the width groups of any module, and proves them: what is cut must compute what the masked full model does."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from hetfl.errors import UsageError
from hetfl.models.state import tensors
from hetfl.submodel.tracing.sizes import Place
from hetfl.submodel.tracing.tracer import Heads, Tracer
from hetfl.submodel.tracing.verify import prove
from hetfl.submodel.widths import Axis, Group, Widths, axis


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
