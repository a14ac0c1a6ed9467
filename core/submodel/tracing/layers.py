"""How linear layers, convolutions, normalisations and embeddings bind channels to their parameters: one function an op.

Each takes the table, what the op returned, and the arguments it was called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hetfl.submodel.tracing.channels import place_along, varies
from hetfl.submodel.tracing.table import ChannelTable


def read_argument(args: Any, kwargs: Any, position: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by name."""
    return kwargs[name] if name in kwargs else args[position] if len(args) > position else default


def name_arguments(*names: str) -> Callable[[Any, Any], Iterator[Any]]:
    """A reader of the leading arguments of an op whose signature begins with `names`; those not given are None."""
    return lambda args, kwargs: (read_argument(args, kwargs, i, name) for i, name in enumerate(names))


def own_matrix(table: ChannelTable, weight: Tensor | None, bias: Tensor | None, outputs: Tensor, inputs: Tensor) -> None:
    """A weight of shape (outputs, inputs) and its bias consist of these channels."""
    table.own(weight, 0, outputs)
    table.own(weight, 1, inputs)
    table.own(bias, 0, outputs)


def trace_map(
    table: ChannelTable, out: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor, outputs: Tensor, o: int, i: int, dim: int
) -> None:
    """An op whose `weight` maps the channels `inputs` (its dim i) to `outputs` (its dim o), which lie in dim `dim` of `out`."""
    table.own(weight, i, inputs)
    table.own(weight, o, outputs)
    table.own(bias, 0, outputs)
    table.assign(out, place_along(outputs, out.ndim, dim % out.ndim))


def trace_linear(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    x, weight, bias = name_arguments("input", "weight", "bias")(args, kwargs)
    ids = table.ids_of(x)
    if ids is not None:
        roots = table.find(ids)
        if not varies(roots, x.ndim - 1) and any(varies(roots, d) for d in range(x.ndim)):
            # mixes the last dim and leaves channels that lie along another as they are (MLP-Mixer's tokens)
            table.assign(out, roots.narrow(x.ndim - 1, 0, 1).expand(*x.shape[:-1], out.shape[-1]))
            return
    inputs, outputs = table.along(ids, -1, x.shape[-1]), table.allocate(weight.shape[0])
    trace_map(table, out, weight, bias, inputs, outputs, 0, 1, -1)


def trace_addmm(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    bias, x, weight = name_arguments("input", "mat1", "mat2")(args, kwargs)
    inputs = table.along(table.ids_of(x), -1, x.shape[-1])
    trace_map(table, out, weight, bias, inputs, table.allocate(weight.shape[1]), 1, 0, -1)


def trace_conv(table: ChannelTable, out: Tensor, args: Any, kwargs: Any, transposed: bool = False) -> None:
    x, weight, bias = name_arguments("input", "weight", "bias")(args, kwargs)
    groups = read_argument(args, kwargs, 6, "groups", 1)
    dim = out.ndim - weight.ndim + 1
    inputs = table.along(table.ids_of(x), dim, x.shape[dim])
    o, i = (1, 0) if transposed else (0, 1)
    if groups == 1:
        trace_map(table, out, weight, bias, inputs, table.allocate(weight.shape[o]), o, i, dim)
    else:
        trace_grouped_conv(table, out, weight, bias, inputs, groups, transposed, dim)


def trace_transposed_conv(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    trace_conv(table, out, args, kwargs, transposed=True)


def trace_grouped_conv(
    table: ChannelTable, out: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor, groups: int, transposed: bool, dim: int
) -> None:
    """Depthwise: each output follows its input. Otherwise every group keeps the same positions, so that groups stay equal."""
    depthwise = int(groups) == len(inputs)
    if depthwise:
        table.claim(groups, inputs)
    count = out.shape[dim]
    if depthwise:
        outputs = inputs.repeat_interleave(count // groups)
    else:
        outputs = table.allocate(count)
        for ids in (inputs.reshape(groups, -1), outputs.reshape(groups, -1)):
            table.tie(ids[:1], ids)
    table.own(weight, 0, inputs if transposed else outputs)
    if not depthwise:
        table.own(weight, 1, outputs.reshape(groups, -1)[0] if transposed else inputs.reshape(groups, -1)[0])
    table.own(bias, 0, outputs)
    table.assign(out, place_along(outputs, out.ndim, dim))


def trace_per_channel(table: ChannelTable, out: Tensor, x: Tensor, parameters: list[Tensor | None]) -> None:
    """An op on (N, channels, …) with parameters of shape (channels,)."""
    ids = table.along(table.ids_of(x), 1, x.shape[1])
    for parameter in parameters:
        table.own(parameter, 0, ids)
    table.assign(out, place_along(ids, out.ndim, 1))


def trace_batch_norm(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    x, mean, var, weight, bias = name_arguments("input", "running_mean", "running_var", "weight", "bias")(args, kwargs)
    trace_per_channel(table, out, x, [mean, var, weight, bias])


def trace_instance_norm(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    trace_batch_norm(table, out, args, kwargs)
    if read_argument(args, kwargs, 3, "weight") is None and read_argument(args, kwargs, 0, "input").shape[1] > 1:
        table.claim_attribute("num_features", table.along(table.ids_of(out), 1, out.shape[1]))


def trace_prelu(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    x, weight = name_arguments("input", "weight")(args, kwargs)
    if weight.numel() > 1:
        trace_per_channel(table, out, x, [weight])
    else:
        table.assign(out, table.ids_of(x))


def trace_group_norm(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """Every group keeps the same positions; with a group for each channel the number of groups follows."""
    x, groups, weight, bias = name_arguments("input", "num_groups", "weight", "bias")(args, kwargs)
    ids = table.along(table.ids_of(x), 1, x.shape[1])
    if int(groups) < len(ids):
        table.tie(ids.reshape(groups, -1)[:1], ids.reshape(groups, -1))
    else:
        table.claim(groups, ids)
    table.note_reduction([(1, ids)])
    trace_per_channel(table, out, x, [weight, bias])


def trace_layer_norm(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    x, shape, weight, bias = name_arguments("input", "normalized_shape", "weight", "bias")(args, kwargs)
    dim = x.ndim - len(shape)
    if len(shape) > 1 and weight is None:
        table.freeze(table.ids_of(x), f"normalised over several dimensions{table.location}")
        return
    ids = table.along(table.ids_of(x), dim, x.shape[dim])
    if weight is None:
        table.claim_attribute("normalized_shape", ids)
    for parameter in (weight, bias if isinstance(bias, Tensor) else None):  # rms_norm has its eps there
        table.own(parameter, 0, ids)
    table.note_reduction([(dim, ids)])
    table.assign(out, place_along(ids, out.ndim, dim))


def trace_embedding(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    _, weight = name_arguments("input", "weight")(args, kwargs)
    ids = table.allocate(weight.shape[1])
    table.own(weight, 0, torch.full((weight.shape[0],), -1))
    table.own(weight, 1, ids)
    table.assign(out, place_along(ids, out.ndim, out.ndim - 1))
