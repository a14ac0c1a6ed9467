"""What each op that owns or mixes parameters does to channel ids: the table of rules, and those of ops other than layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hetfl.submodel.tracing import layers, sequences, weights
from hetfl.submodel.tracing.channels import place_along, read_along, varies
from hetfl.submodel.tracing.layers import name_arguments, read_argument
from hetfl.submodel.tracing.ops import MADE, MOVES, NUMBERS, REDUCE, SAME, SPATIAL
from hetfl.submodel.tracing.table import ChannelTable


def trace_matmul(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """A weight maps channels; else channels along the inner dim are tied, and those along the outer ones stay."""
    a, b = args[0], read_argument(args, kwargs, 1, "other", kwargs.get("mat2"))
    left, right = (torch.full(x.shape, -1) if (ids := table.ids_of(x)) is None else table.find(ids) for x in (a, b))
    if table.is_raw(b) and b.ndim >= 2 and not (varies(left, left.ndim - 2) and not varies(left, left.ndim - 1)):
        inputs = table.along(left, -1, a.shape[-1])
        layers.trace_map(table, out, b, None, inputs, table.allocate(b.shape[-1]), b.ndim - 1, b.ndim - 2, -1)
        return
    if table.is_raw(a) and a.ndim >= 2 and varies(right, right.ndim - 2):
        inputs = table.along(right, -2, b.shape[-2])
        layers.trace_map(table, out, a, None, inputs, table.allocate(a.shape[-2]), a.ndim - 2, a.ndim - 1, -2)
        return
    left, right = (torch.full(x.shape, -1) if table.is_raw(x) else ids for x, ids in ((a, left), (b, right)))
    if a.ndim < 2 or b.ndim < 2:
        table.freeze(left, f"matrix times vector{table.location}")
        table.freeze(right, f"matrix times vector{table.location}")
        return
    if varies(left, left.ndim - 1) or varies(right, right.ndim - 2):
        if varies(left, left.ndim - 2) or varies(right, right.ndim - 1):
            table.freeze(left, f"channels are mixed with other dimensions{table.location}")
            table.freeze(right, f"channels are mixed with other dimensions{table.location}")
        table.tie(left[..., 0, :], right[..., :, 0])
        return
    table.assign(out, table.make_rectangular(table.combine(left[..., :1], right[..., :1, :]).expand(out.shape)))


def trace_einsum(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """Letters are dims: channels are tied letter by letter; a parameter's last letter in the output is the one of its outputs."""
    operands = args[1] if isinstance(args[1], tuple | list) else args[1:]
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    if "->" not in equation or "." in equation:
        for x in operands:
            table.freeze(table.ids_of(x), f"unknown operation einsum{table.location}")
        return
    ins, outs = equation.split("->")
    spelt = list(zip(operands, ins.split(","), strict=True))
    lines = tie_letters(table, [(x, letters) for x, letters in spelt if not table.is_raw(x)])
    for x, letters in spelt:
        if table.is_raw(x):
            fresh = [c for c in letters if c not in lines and c in outs][-1:]
            lines |= {c: table.allocate(x.shape[letters.index(c)]) for c in fresh}
            for dim, letter in enumerate(letters):
                table.own(x, dim, lines.get(letter, torch.full((x.shape[dim],), -1)))
    varying = [c for c in outs if c in lines]
    for letter in varying[:-1]:
        table.freeze(lines[letter], f"channels are mixed with other dimensions{table.location}")
    if varying:
        table.assign(out, place_along(lines[varying[-1]], out.ndim, outs.index(varying[-1])))


def tie_letters(table: ChannelTable, spelt: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
    """The channels of each letter of activations; where an operand has the letter but not the channels, these are frozen."""
    lines: dict[str, Tensor] = {}
    found = [find_channel_dim(table, x) for x, _ in spelt]
    for (_, letters), channels in zip(spelt, found, strict=True):
        if channels is not None:
            dim, line = channels
            table.tie(lines.setdefault(letters[dim], line), line)
    for (x, letters), channels in zip(spelt, found, strict=True):
        for dim, letter in enumerate(letters):
            if letter in lines and x.shape[dim] > 1 and (channels is None or channels[0] != dim):
                table.freeze(lines[letter], f"joins channels that cannot be cut{table.location}")
    return lines


def find_channel_dim(table: ChannelTable, x: Tensor) -> tuple[int, Tensor] | None:
    """The one dim along which the channels of an activation vary, and these; None (and frozen) where there is not one."""
    ids = table.ids_of(x)
    if ids is None:
        return None
    roots = table.find(ids)
    found = [(d, line) for d in range(x.ndim) if (line := read_along(roots, d)) is not None]
    if not found:
        table.freeze(ids, f"channels are mixed with other dimensions{table.location}")
    return found[0] if found else None


def trace_unfold(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """torch.nn.functional.unfold, (N, C, …) -> (N, C * window, positions): each channel's window side by side."""
    ids = table.along(table.ids_of(args[0]), 1, args[0].shape[1])
    table.assign(out, place_along(ids.repeat_interleave(out.shape[1] // len(ids)), out.ndim, 1))


def trace_fold(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """The inverse of unfold: the channels of a window are one."""
    ids = table.along(table.ids_of(args[0]), -2, args[0].shape[-2]).reshape(out.shape[-3], -1)
    table.tie(ids[:, :1], ids)
    table.assign(out, place_along(ids[:, 0], out.ndim, out.ndim - 3))


def trace_pad(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """Padding along the channels adds positions without a channel."""
    x, sizes = name_arguments("input", "pad")(args, kwargs)
    ids = table.ids_of(x)
    if ids is None:
        return
    dim = next((d for d in range(x.ndim) if varies(table.find(ids), d)), 1)
    line, at = table.along(ids, dim, x.shape[dim]), 2 * (x.ndim - 1 - dim)
    if at < len(sizes):
        line = torch.nn.functional.pad(line, tuple(sizes[at : at + 2]), value=-1)
    table.assign(out, place_along(line, out.ndim, dim))


def trace_glu(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """The two halves are multiplied, so they are cut alike."""
    ids = table.ids_of(args[0])
    if ids is not None:
        first, second = ids.chunk(2, read_argument(args, kwargs, 1, "dim", -1))
        table.tie(first, second)
        table.assign(out, first)


def trace_normalize(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """Over channels too: over those that remain."""
    ids, dim = table.ids_of(args[0]), read_argument(args, kwargs, 2, "dim", 1)
    if ids is not None and varies(table.find(ids), dim):
        table.note_reduction([(dim % ids.ndim, table.along(ids, dim, args[0].shape[dim]))])
    table.assign(out, ids)


RULES: dict[str, Callable[[ChannelTable, Any, Any, Any], None]] = {
    "linear": layers.trace_linear,
    "addmm": layers.trace_addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), layers.trace_conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), layers.trace_transposed_conv),
    "batch_norm": layers.trace_batch_norm,
    "instance_norm": layers.trace_instance_norm,
    "prelu": layers.trace_prelu,
    "group_norm": layers.trace_group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), layers.trace_layer_norm),
    "embedding": layers.trace_embedding,
    **dict.fromkeys(("matmul", "bmm", "__matmul__", "mm"), trace_matmul),
    "scaled_dot_product_attention": sequences.trace_attention,
    "multi_head_attention_forward": sequences.trace_multi_head_attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), sequences.trace_recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), sequences.trace_recurrent_cell),
    "einsum": trace_einsum,
    "unfold": trace_unfold,
    "fold": trace_fold,
    "glu": trace_glu,
    "normalize": trace_normalize,
    "pad": trace_pad,
}

# ops that compute something; that a module calls others (`x.device`, `x.dim()`) says nothing
COMPUTES = MADE | MOVES | NUMBERS | REDUCE | SAME | SPATIAL | frozenset(RULES) | frozenset(weights.OTHERS)
