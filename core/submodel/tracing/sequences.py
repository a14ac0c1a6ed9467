"""How attention and recurrent layers bind channels to their parameters: one function an op, with the arguments of `layers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetfl.submodel.tracing.channels import place_along, varies
from hetfl.submodel.tracing.layers import name_arguments, own_matrix, read_argument
from hetfl.submodel.tracing.table import ChannelTable


def trace_attention(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """scaled_dot_product_attention: queries and keys share the head width; where heads are cut whole, all three share the heads."""
    q, k, v = name_arguments("query", "key", "value")(args, kwargs)
    table.draws |= read_argument(args, kwargs, 4, "dropout_p", 0.0) > 0
    every = [torch.full(x.shape, -1) if (ids := table.ids_of(x)) is None else table.find(ids) for x in (q, k, v)]
    heads = next((d for roots in every for d in range(roots.ndim - 2) if varies(roots, d)), None)
    if heads is not None:
        lines = [table.along(roots, heads, roots.shape[heads]) for roots in every]
        for line in lines[:2]:
            table.tie(lines[2], line)
        table.assign(out, place_along(lines[2], out.ndim, heads))
        return
    lines = [table.along(roots, -1, x.shape[-1]) for roots, x in zip(every, (q, k, v), strict=True)]
    table.tie(lines[0], lines[1])
    table.split += [(line, x.shape[-3]) for line, x in zip(lines, (q, k, v), strict=True) if x.ndim > 3]
    table.assign(out, place_along(lines[2], out.ndim, out.ndim - 1))


def trace_multi_head_attention(table: ChannelTable, out: Any, args: Any, kwargs: Any) -> None:
    """torch.nn.MultiheadAttention: one embedding of heads x width everywhere, so its channels are cut with the heads."""
    q, k, v, size, heads, packed, packed_bias, bias_k, bias_v, _, p, weight, bias = name_arguments(
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
        "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    )(args, kwargs)  # fmt: skip
    table.draws |= p > 0 and read_argument(args, kwargs, 13, "training", True)
    whole = table.heads == "whole"
    width = int(size) // heads
    ids = table.allocate(int(heads) if whole else width)
    inner = ids.repeat_interleave(width) if whole else ids.repeat(heads)
    lines = [table.along(table.ids_of(x), -1, x.shape[-1]) for x in (q, k, v)]
    table.tie(lines[0], inner)
    if not whole:
        table.split.append((ids, int(heads)))
    if packed is not None:
        table.packed |= {table.names[id(t)] for t in (packed, packed_bias) if id(t) in table.names}
        for line in lines[1:]:
            table.tie(lines[0], line)
        table.own(packed, 0, inner.repeat(3))
        table.own(packed, 1, inner)
    for name, line in zip("qkv", lines, strict=True):
        own_matrix(table, kwargs.get(f"{name}_proj_weight") if packed is None else None, None, inner, line)
    table.own(packed_bias, 0, inner.repeat(3))
    for extra in (bias_k, bias_v):
        table.own(extra, 2, inner)
    table.claim(size, inner)
    table.claim_attribute("embed_dim", inner)
    table.claim_attribute("num_heads" if whole else "head_dim", ids)
    outputs = table.allocate(weight.shape[0])
    own_matrix(table, weight, bias, outputs, inner)
    table.assign(out[0], place_along(outputs, out[0].ndim, out[0].ndim - 1))


def trace_recurrent(table: ChannelTable, out: Any, args: Any, kwargs: Any) -> None:
    """LSTM, GRU and RNN: one number of hidden channels for all layers and directions, the gates stacked in the rows of weights."""
    at = next(i for i, a in enumerate(args) if isinstance(a, list))
    x, state, flat, (biased, layers, p, training, both) = args[0], args[at - 1], args[at], args[at + 1 : at + 6]
    table.draws |= p > 0 and training
    hidden = table.allocate(flat[1].shape[1])
    tie_state(table, state, hidden)
    directions = 2 if both else 1
    each = len(flat) // (layers * directions)
    inputs = table.along(table.ids_of(x), -1, x.shape[-1])
    for layer in range(layers):
        for direction in range(directions):
            start = (layer * directions + direction) * each
            rows = hidden.repeat(flat[start].shape[0] // len(hidden))
            own_matrix(table, flat[start], flat[start + 2] if biased else None, rows, inputs)
            own_matrix(table, flat[start + 1], flat[start + 3] if biased else None, rows, hidden)
            if each > (4 if biased else 2):
                table.freeze(hidden, f"projected states{table.location}")
        inputs = hidden.repeat(directions)
    table.claim_attribute("hidden_size", hidden)
    for leaf in out if isinstance(out, tuple) else [out]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            line = inputs if leaf is out[0] else hidden
            table.assign(leaf, place_along(line, leaf.ndim, leaf.ndim - 1))


def trace_recurrent_cell(table: ChannelTable, out: Any, args: Any, kwargs: Any) -> None:
    """One step of LSTMCell, GRUCell or RNNCell."""
    x, state, w_ih, w_hh, b_ih, b_hh = (*args, None, None)[:6]
    hidden = table.allocate(w_hh.shape[1])
    tie_state(table, state, hidden)
    rows = hidden.repeat(w_hh.shape[0] // len(hidden))
    own_matrix(table, w_ih, b_ih, rows, table.along(table.ids_of(x), -1, x.shape[-1]))
    own_matrix(table, w_hh, b_hh, rows, hidden)
    table.claim_attribute("hidden_size", hidden)
    for leaf in out if isinstance(out, tuple) else [out]:
        table.assign(leaf, place_along(hidden, leaf.ndim, leaf.ndim - 1))


def tie_state(table: ChannelTable, state: Any, hidden: Tensor) -> None:
    """The state that a recurrent layer is given, a tensor or a tuple of them, holds the layer's channels where it holds any."""
    for tensor in state if isinstance(state, tuple | list) else [state]:
        if (ids := table.ids_of(tensor)) is not None:
            table.tie(hidden, table.along(ids, -1, tensor.shape[-1]))
