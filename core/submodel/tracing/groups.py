"""Finds the width groups of any module and proves them: a model that is cut must compute what the full one with zeros does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from hetfl.errors import UsageError
from hetfl.models.state import tensors
from hetfl.submodel.tracing.table import ChannelTable, Heads, Key
from hetfl.submodel.tracing.tracer import Tracer
from hetfl.submodel.tracing.verify import describe_error, prove
from hetfl.submodel.widths import Attribute, Axis, Group, Widths, make_axis


def trace(model: nn.Module, *inputs: Tensor, verify: bool = True, heads: Heads = "width", hollow: bool = False) -> Widths:
    """The width groups of `model`, found by running it on `inputs` (a batch of two or more), in evaluation and training mode.

    With `verify` every group is proven: the model cut at random must compute what the full model computes with the removed entries
    zero (`verify.prove`: two cuts, relative error at most 1e-4, reductions over the channels that remain); a group that fails is
    frozen. `heads` says what is cut of attention: the width of every head or whole heads. The model and torch's random state are
    left as they were, but with `hollow` the parameters that need no gradient lose their values, which no proof needs, and take no
    memory. Raises UsageError where the model does not run.
    """
    modes, before = [(m, m.training) for m in model.modules()], {name: t.clone() for name, t in model.named_buffers()}
    try:
        tracer = Tracer(model, heads)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(*inputs)  # the first call may differ from later ones
            for training in (False, True):
                tracer.run(model.train(training), *inputs)
                restore_buffers(model, before)
            refuse_branches(tracer, model)
            model.eval()
            widths = form_widths(tracer.table, model)
            if hollow:
                empty_frozen(model)
            return prove(widths, model, inputs) if verify else widths
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(explain_failure(model, inputs, error)) from error
    finally:
        restore_buffers(model, before)
        for module, training in modes:
            module.training = training


def empty_frozen(model: nn.Module) -> None:
    """Puts one 0 in place of all entries of each parameter that needs no gradient."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.new_zeros(1).expand(parameter.shape)


def refuse_branches(tracer: Tracer, model: nn.Module) -> None:
    """Raises UsageError where the code chose a path by the values of tensors and parameters lie on another: it was not traced."""
    missed = [name for name, p in model.named_parameters() if id(p) not in tracer.reached]
    if tracer.branches and missed:
        raise UsageError(
            f"the forward pass of '{tracer.branches[0] or type(model).__name__}' branches on the values of tensors, and "
            f"'{missed[0]}' lies on a path that was not taken: compute both paths and choose with torch.where"
        )


def restore_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Sets the buffers of `model` to the values in `buffers`, in place."""
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            tensor.copy_(buffers[name])


def explain_failure(model: nn.Module, inputs: Sequence[Tensor], error: Exception) -> str:
    """The sentence for a model whose forward pass raised `error`: what is wrong, and what to do."""
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
    return f"the model does not run on inputs of shape {shapes}: {describe_error(error)}"


Occurrences = dict[int, dict[Key, int]]  # for each channel: how often it occurs in which dims


def form_widths(table: ChannelTable, model: nn.Module) -> Widths:
    """The groups that the table's channels form: those that lie in the same dims of the same tensors are one group's units."""
    shapes = {name: tuple(t.shape) for name, t in tensors(model).items()}
    lines = resolve_axes(table, model, shapes)
    occurrences, reasons = count_occurrences(lines), collect_reasons(table)
    cut = {channel: found for channel, found in occurrences.items() if channel not in reasons}
    groups, numbers = form_groups(cut, read_heads(table, cut))
    names, known = tuple(g.name for g in groups), dict[tuple[int, ...], Axis | None]()

    def to_axis(line: Tensor) -> Axis | None:
        """The axis of these channels; None where no group cuts them. Dims that have the same channels have one axis."""
        channels = tuple(line.tolist())
        if channels not in known:
            pairs = [numbers.get(channel, (-1, -1)) for channel in channels]
            known[channels] = make_axis(names, pairs) if any(group >= 0 for group, _ in pairs) else None
        return known[channels]

    axes: dict[str, dict[int, Axis]] = {}
    for (name, dim), line in lines.items():
        if (axis := to_axis(line)) is not None:
            axes.setdefault(name, {})[dim] = axis
    claims = {claim.attribute: (to_axis(table.find(claim.ids)), claim.share) for claim in reversed(table.claims)}
    sizes = {attribute: (axis, share) for attribute, (axis, share) in claims.items() if axis is not None}
    frozen = {min(occurrences[channel])[0]: why for channel, why in reasons.items() if channel in occurrences}
    reductions = {
        op: [(dim, axis) for dim, line in dims if (axis := to_axis(table.find(line))) is not None]
        for op, dims in table.reductions.items()
    }
    return Widths(tuple(groups), axes, shapes, frozen, table.draws, sizes, {op: dims for op, dims in reductions.items() if dims})


def resolve_axes(table: ChannelTable, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[Key, Tensor]:
    """The channels of every dim of every tensor, shape (size,), after the last ties: those of attributes and of unsent buffers."""
    used = {channel for line in (*table.axes.values(), *table.used) for channel in table.find(line).unique().tolist()} - {-1}
    lines = dict(table.axes)
    for key, line in table.dims.items():
        if not used.isdisjoint(table.find(line).tolist()):
            table.tie(lines.setdefault(key, line), line)
    for name, dim in [key for key in lines if key[0] not in shapes]:
        buffer = model.get_buffer(name)  # outside the state: it keeps its first entries, right only if all entries are the same
        if not torch.equal(buffer, buffer.narrow(dim, 0, 1).expand_as(buffer)):
            table.freeze(lines[name, dim], f"'{name}' is a buffer that is not part of the state")
    tie_claims(table)
    return {key: table.find(line) for key, line in lines.items()}


def tie_claims(table: ChannelTable) -> None:
    """Ties the channels that one attribute counts in several places; where their numbers differ they are frozen."""
    first: dict[Attribute, tuple[Tensor, Fraction]] = {}
    for attribute, ids, share in table.claims:
        rows = table.find(ids).reshape(share.numerator, -1) if len(ids) % share.numerator == 0 else ids[None]
        if bool((rows == rows[:1]).all()):  # the same channels several times over
            ids, share = rows[0], share / len(rows)
        ours, other = first.setdefault(attribute, (ids, share))
        if len(ours) == len(ids) and share == other:
            table.tie(ours, ids)
        else:
            table.freeze(ids, f"'{attribute[1]}' counts other channels too")


def count_occurrences(lines: Mapping[Key, Tensor]) -> Occurrences:
    """For each channel how often it occurs in which dims."""
    found: Occurrences = {}
    for key, line in lines.items():
        for channel in line.tolist():
            if channel >= 0:
                counts = found.setdefault(channel, {})
                counts[key] = counts.get(key, 0) + 1
    return found


def collect_reasons(table: ChannelTable) -> dict[int, str]:
    """Why a channel cannot be cut, for those that cannot: the first reason noted."""
    reasons: dict[int, str] = {}
    for ids, why in table.frozen:
        for channel in table.find(ids).unique().tolist():
            reasons.setdefault(channel, why)
    return reasons


def read_heads(table: ChannelTable, occurrences: Occurrences) -> dict[int, int]:
    """For each channel that attention has in several heads their number, where every tensor has it once a head, and a packed one
    once a head of queries, keys and values; layouts that mix these otherwise are not known, nor are fewer heads of keys."""
    found: dict[int, set[int]] = {}
    for ids, heads in table.split:
        for channel in table.find(ids).unique().tolist():
            found.setdefault(channel, set()).add(heads)

    def fits(channel: int, heads: int) -> bool:
        return all(n == heads * (3 if dim == 0 and name in table.packed else 1) for (name, dim), n in occurrences[channel].items())

    numbers = {channel: heads.pop() for channel, heads in found.items() if channel in occurrences and len(heads) == 1}
    return {channel: heads for channel, heads in numbers.items() if fits(channel, heads)}


def form_groups(occurrences: Occurrences, heads: Mapping[int, int]) -> tuple[list[Group], dict[int, tuple[int, int]]]:
    """The groups, and (group, unit) for each channel."""
    alike: dict[tuple[tuple[Key, int], ...], list[int]] = {}
    for channel in sorted(occurrences):
        alike.setdefault(tuple(occurrences[channel].items()), []).append(channel)
    groups: list[Group] = []
    numbers: dict[int, tuple[int, int]] = {}
    for signature, channels in alike.items():
        if len(channels) > 1:
            numbers.update({channel: (len(groups), unit) for unit, channel in enumerate(channels)})
            shared = {heads.get(channel, 1) for channel in channels}
            name = make_unique_name(signature[0][0][0], groups)
            groups.append(Group(name, len(channels), shared.pop() if len(shared) == 1 else 1))
    return groups, numbers


def make_unique_name(parameter: str, groups: Sequence[Group]) -> str:
    """A group's name: that of the first layer it cuts, with #2, #3, … where a group has it already."""
    name = parameter.removesuffix(".weight")
    used = {g.name for g in groups}
    return next(n for n in (name, *(f"{name}#{i}" for i in range(2, len(used) + 3))) if n not in used)
